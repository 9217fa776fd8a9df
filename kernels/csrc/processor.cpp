// What a thread leaves in the registers of its processor.
#include "mien.h"

#if defined(__x86_64__)
#include <immintrin.h>

__attribute__((target("avx"))) static void clear_upper_halves() { _mm256_zeroupper(); }

void mien_clear_upper_halves(void) {
    if (__builtin_cpu_supports("avx")) clear_upper_halves();
}
#else
void mien_clear_upper_halves(void) {}
#endif
