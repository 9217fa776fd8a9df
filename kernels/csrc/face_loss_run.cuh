// What a thread of the picture losses reads and writes: lanes, runs of a row, 16-bit numbers.
//
// `Lanes` is what a thread works on at once: float on a GPU, a vector of kWidth neighbours on a
// CPU, where a block has as many times fewer threads.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include "face_loss.h"
#include "lanes.cuh"

namespace mien {

// Chosen on the CPU, unmeasured on a GPU.
constexpr int kRun = 12;           // lanes that a thread makes of a row
constexpr int kLossThreads = 128;  // of a block, with lanes of one float

struct Tile {
    int64_t face;   // of both sides
    int64_t block;  // its place in the partial sums
    int first_row, first;
};

MIEN_HD Tile tile_at(const LossCall &call, int64_t block) {
    const int tiles = call.tiles_x * call.tiles_y;
    const int64_t face = block / tiles;
    const int place = static_cast<int>(block - face * tiles);
    const int y = place / call.tiles_x;
    return {face, block, y * kTileRows, (place - y * call.tiles_x) * kTileLength};
}

MIEN_HD bool asks_for_pixels(const LossCall &call) {
    return call.asked[MIEN_MAE] || call.asked[MIEN_MSE] || call.asked[MIEN_LOGCOSH] ||
           call.asked[MIEN_SMOOTH_LOSS];
}

// Four numbers of a row, loaded or stored as one word.
template <class Raw>
struct alignas(4 * sizeof(Raw)) Four {
    Raw at[4];
};

// ---- 16-bit numbers ---------------------------------------------------------------------------

MIEN_HD float float_of_half(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFFu) << 13;
    if (magnitude >= 0x7C00u << 13) return bits_float(sign | magnitude | 0x7F800000u);
    // The exponent's bias grows from 15 to 127; the product is exact, for subnormals too.
    return bits_float(sign | float_bits(bits_float(magnitude) * 0x1p112f));
#endif
}

MIEN_HD uint16_t half_of_float(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
    if (magnitude < 0x38800000u)  // subnormal: adding 1/2 rounds at its last place, 2^-24
        return static_cast<uint16_t>(sign |
                                     (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f)));
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | ((rebased + 0x0FFFu + ((rebased >> 13) & 1)) >> 13));
#endif
}

MIEN_HD float float_of_bfloat(uint16_t bits) {
    return bits_float(static_cast<uint32_t>(bits) << 16);
}

MIEN_HD uint16_t bfloat_of_float(float value) {
    const uint32_t bits = float_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
    return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

MIEN_HD float float_of(float value, int) { return value; }
MIEN_HD float float_of(uint16_t bits, int type) {
    return type == MIEN_BFLOAT16 ? float_of_bfloat(bits) : float_of_half(bits);
}
MIEN_HD void set_to(float &out, float value, int) { out = value; }
MIEN_HD void set_to(uint16_t &out, float value, int type) {
    out = type == MIEN_BFLOAT16 ? bfloat_of_float(value) : half_of_float(value);
}

// ---- runs -------------------------------------------------------------------------------------

// The part of a row that a thread works on: kRun * kWidth numbers, `count` of them in the picture.
template <class Lanes>
struct Run {
    static constexpr int kLength = kRun * kWidth<Lanes>;
    int row;     // of the tile
    int start;   // of the tile's row
    int count;   // 0 below the picture
    int64_t at;  // of the face's pixels, in numbers
    int x, y;    // first pixel, and row of the picture
};

template <class Lanes, int kChannels>
MIEN_HD Run<Lanes> run_of(const LossCall &call, const Tile &tile, int thread) {
    constexpr int kLength = Run<Lanes>::kLength, kRuns = kTileLength / kLength;
    Run<Lanes> run;
    run.row = thread / kRuns;
    run.start = (thread - run.row * kRuns) * kLength;
    run.y = tile.first_row + run.row;
    const int first = tile.first + run.start;
    run.count = run.y < call.height ? clamp_int(call.length - first, 0, kLength) : 0;
    run.at = int64_t{run.y} * call.length + first;
    run.x = first / kChannels;
    return run;
}

// 0 past the picture.
template <int kLength, class Raw>
MIEN_HD void load_run(const Raw *from, int type, int count, bool wide, float (&values)[kLength]) {
    if (wide && count == kLength) {
        MIEN_UNROLL
        for (int i = 0; i < kLength; i += 4) {
            const Four<Raw> word = *reinterpret_cast<const Four<Raw> *>(from + i);
            MIEN_UNROLL
            for (int k = 0; k < 4; ++k) values[i + k] = float_of(word.at[k], type);
        }
    } else {
        MIEN_UNROLL
        for (int i = 0; i < kLength; ++i) values[i] = i < count ? float_of(from[i], type) : 0.0f;
    }
}

template <int kLength>
MIEN_HD void load_run(const void *from, int type, int64_t at, int count, bool wide,
                      float (&values)[kLength]) {
    if (type == MIEN_FLOAT32)
        load_run(static_cast<const float *>(from) + at, type, count, wide, values);
    else
        load_run(static_cast<const uint16_t *>(from) + at, type, count, wide, values);
}

template <int kLength, class Raw>
MIEN_HD void store_run(Raw *to, int type, int count, bool wide, const float (&values)[kLength]) {
    if (wide && count == kLength) {
        MIEN_UNROLL
        for (int i = 0; i < kLength; i += 4) {
            Four<Raw> word;
            MIEN_UNROLL
            for (int k = 0; k < 4; ++k) set_to(word.at[k], values[i + k], type);
            *reinterpret_cast<Four<Raw> *>(to + i) = word;
        }
    } else {
        MIEN_UNROLL
        for (int i = 0; i < kLength; ++i)
            if (i < count) set_to(to[i], values[i], type);
    }
}

// Weight of each number of a run; 0 past the picture.
template <int kChannels, int kLength>
MIEN_HD void load_weights(const LossCall &call, int64_t face, int x, int y, int count,
                          float (&weights)[kLength]) {
    constexpr int kPixels = kLength / kChannels;
    float pixels[kPixels];
    if (call.weight) {
        const int64_t at = (face * call.height + y) * call.width + x;
        load_run(call.weight + at, 0, count / kChannels, call.wide, pixels);
    } else {
        MIEN_UNROLL
        for (int i = 0; i < kPixels; ++i) pixels[i] = i * kChannels < count ? 1.0f : 0.0f;
    }
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i) weights[i] = pixels[i / kChannels];
}

// By how much the first and last row and column of the picture are multiplied: 2, or 1/2.
template <int kChannels, int kLength>
MIEN_HD void scale_border(const LossCall &call, int x, int y, float factor,
                          float (&values)[kLength]) {
    const float of_row = y == 0 || y == call.height - 1 ? factor : 1.0f;
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i) {
        const int column = x + i / kChannels;
        values[i] *= column == 0 || column == call.width - 1 ? factor * of_row : of_row;
    }
}

// Times the scale and the share of one number in the mean.
template <int kLength>
MIEN_HD void store_gradient(const LossCall &call, int side, int64_t at, int count,
                            float (&gradient)[kLength]) {
    const float factor = call.inverse_count * (call.scale ? *call.scale : 1.0f);
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i) gradient[i] *= factor;
    if (call.pred_type == MIEN_FLOAT32)
        store_run(static_cast<float *>(call.gradients[side]) + at, call.pred_type, count, call.wide,
                  gradient);
    else
        store_run(static_cast<uint16_t *>(call.gradients[side]) + at, call.pred_type, count,
                  call.wide, gradient);
}

}  // namespace mien
