// CRC-32 by tables, eight bytes at a time, and by carry-less products where the processor has them.
#include "crc32.h"

#include <string.h>

#include "processor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr uint32_t kPolynomial = 0xedb88320;  // its bits in reverse, as the data's are

// What a byte that stands `slice` bytes before the end of eight adds to the checksum.
struct Tables {
    uint32_t of[8][256] = {};
    constexpr Tables() {
        for (uint32_t byte = 0; byte < 256; ++byte) {
            uint32_t crc = byte;
            for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
            of[0][byte] = crc;
        }
        for (int slice = 1; slice < 8; ++slice)
            for (int byte = 0; byte < 256; ++byte) {
                const uint32_t before = of[slice - 1][byte];
                of[slice][byte] = before >> 8 ^ of[0][before & 255];
            }
    }
};
constexpr Tables kTables;

// The checksum of what came before, in the form between two bytes, led over more of them.
uint32_t by_tables(uint32_t crc, const uint8_t *data, size_t num_bytes) {
    for (; num_bytes >= 8; data += 8, num_bytes -= 8) {
        const uint32_t low =
            crc ^ (data[0] | data[1] << 8 | data[2] << 16 | uint32_t{data[3]} << 24);
        crc = 0;
        for (int i = 0; i < 4; ++i) {
            crc ^= kTables.of[7 - i][low >> 8 * i & 255];
            crc ^= kTables.of[3 - i][data[4 + i]];
        }
    }
    for (; num_bytes; ++data, --num_bytes) crc = crc >> 8 ^ kTables.of[0][(crc ^ *data) & 255];
    return crc;
}

#if defined(__x86_64__)
constexpr size_t kLaneBytes = 16, kLanes = 4, kStepBytes = kLanes * kLaneBytes;

// Powers of x modulo the polynomial, in reverse: x^(n + 32) and x^(n - 32) move a lane by n bits.
constexpr int64_t kByStep[2] = {0x154442bd4, 0x1c6e41596};  // n = 512
constexpr int64_t kByLane[2] = {0x1751997d0, 0x0ccaa009e};  // n = 128

__attribute__((target("pclmul,sse4.1"))) inline __m128i lane_at(const uint8_t *data) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i *>(data));
}

// The lane as it counts so many bits further on, added to what stands there.
__attribute__((target("pclmul,sse4.1"))) inline __m128i moved(__m128i lane, __m128i by,
                                                              __m128i there) {
    const __m128i low = _mm_clmulepi64_si128(lane, by, 0x00);
    const __m128i high = _mm_clmulepi64_si128(lane, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

// As `by_tables`, of at least kStepBytes.
__attribute__((target("pclmul,sse4.1"))) uint32_t by_products(uint32_t crc, const uint8_t *data,
                                                              size_t num_bytes) {
    __m128i lanes[kLanes];
    for (size_t i = 0; i < kLanes; ++i) lanes[i] = lane_at(data + i * kLaneBytes);
    lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
    const __m128i by_step = _mm_set_epi64x(kByStep[1], kByStep[0]);
    for (data += kStepBytes, num_bytes -= kStepBytes; num_bytes >= kStepBytes;
         data += kStepBytes, num_bytes -= kStepBytes)
        for (size_t i = 0; i < kLanes; ++i)
            lanes[i] = moved(lanes[i], by_step, lane_at(data + i * kLaneBytes));
    const __m128i by_lane = _mm_set_epi64x(kByLane[1], kByLane[0]);
    for (size_t i = 1; i < kLanes; ++i) lanes[i] = moved(lanes[i - 1], by_lane, lanes[i]);
    // The last lane stands for all that came before it: bytes with the same checksum.
    uint8_t rest[kLaneBytes];
    memcpy(rest, &lanes[kLanes - 1], kLaneBytes);
    return by_tables(by_tables(0, rest, kLaneBytes), data, num_bytes);
}
#endif

}  // namespace

uint32_t mien::crc32(const uint8_t *data, size_t num_bytes) {
    constexpr uint32_t kOnes = 0xffffffff;
#if defined(__x86_64__)
    if (num_bytes >= kStepBytes && may_use_avx2() && __builtin_cpu_supports("pclmul"))
        return by_products(kOnes, data, num_bytes) ^ kOnes;
#endif
    return by_tables(kOnes, data, num_bytes) ^ kOnes;
}
