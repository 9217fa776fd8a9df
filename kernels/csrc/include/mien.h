/* The C ABI of libmien. kernels/native.py hands this same text to cffi: keep it to plain C
 * declarations. Every call returns a mien_status; no call prints, aborts or synchronizes.
 * Pointers are borrowed for the call; `stream` is a cudaStream_t (ignored by *_cpu calls). */
#ifndef MIEN_H
#define MIEN_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define MIEN_API __attribute__((visibility("default")))

typedef enum {
    MIEN_OK = 0,
    MIEN_INVALID_ARGUMENT = 1,
    MIEN_CUDA_ERROR = 2,
    MIEN_NOT_BUILT = 3,
} mien_status;

/* SHA-256 of this file when the library was built; the loader refuses a library of another. */
MIEN_API const char *mien_header_hash(void);

/* Why this thread's last failing call failed. Valid until its next call into libmien. */
MIEN_API const char *mien_last_error(void);

/* 1 where the library holds CUDA kernels, else 0. */
MIEN_API int32_t mien_has_cuda(void);

#ifdef __cplusplus
}
#endif
#endif
