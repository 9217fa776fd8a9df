// Winograd's transforms of 3x3 convolutions, F(2x2, 3x3) of Lavin and Gray (arXiv 1509.09308),
// section 4.1. Compiled once per instruction set: channels lie together, so that a vector holds
// eight of them with AVX2, and one without.
#include "lanes.cuh"
#include "winograd.h"

namespace {

#if defined(__AVX2__) && defined(__FMA__)
using Lanes = mien::EightFloats;
#else
using Lanes = float;
#endif

// ---- one axis of a transform: kFrom numbers, `step` apart, become kTo -------------------------

struct InputToTile {  // B^T
    static constexpr int kFrom = 4, kTo = 4;
    template <class V>
    static void map(const V *d, int step, V *t, int to_step) {
        t[0] = d[0] - d[2 * step];
        t[to_step] = d[step] + d[2 * step];
        t[2 * to_step] = d[2 * step] - d[step];
        t[3 * to_step] = d[step] - d[3 * step];
    }
};

struct TileToOutput {  // A^T
    static constexpr int kFrom = 4, kTo = 2;
    template <class V>
    static void map(const V *m, int step, V *y, int to_step) {
        y[0] = m[0] + m[step] + m[2 * step];
        y[to_step] = m[step] - m[2 * step] - m[3 * step];
    }
};

struct GradientToTile {  // A
    static constexpr int kFrom = 2, kTo = 4;
    template <class V>
    static void map(const V *g, int step, V *t, int to_step) {
        t[0] = g[0];
        t[to_step] = g[0] + g[step];
        t[2 * to_step] = g[0] - g[step];
        t[3 * to_step] = -g[step];
    }
};

struct KernelToTile {  // G
    static constexpr int kFrom = 3, kTo = 4;
    template <class V>
    static void map(const V *g, int step, V *t, int to_step) {
        const V ends = g[0] + g[2 * step];
        t[0] = g[0];
        t[to_step] = 0.5f * (ends + g[step]);
        t[2 * to_step] = 0.5f * (ends - g[step]);
        t[3 * to_step] = g[2 * step];
    }
};

struct TileToKernel {  // G^T
    static constexpr int kFrom = 4, kTo = 3;
    template <class V>
    static void map(const V *t, int step, V *g, int to_step) {
        const V sum = 0.5f * (t[step] + t[2 * step]);
        g[0] = t[0] + sum;
        g[to_step] = 0.5f * (t[step] - t[2 * step]);
        g[2 * to_step] = sum + t[3 * step];
    }
};

// ---- both axes, over all channels of one place ------------------------------------------------

// Numbers of the square that a transform reads or writes: a pointer each, null outside the picture.
struct Square {
    const float *from[mien::kTilePoints];
    float *to[mien::kTilePoints];
};

template <class Axis, class V>
void transform(const Square &square, int64_t channel) {
    constexpr int kFrom = Axis::kFrom, kTo = Axis::kTo;
    V values[kFrom * kFrom], half[kTo * kFrom], result[kTo * kTo];
    for (int i = 0; i < kFrom * kFrom; ++i)
        values[i] = square.from[i] ? mien::load_lanes<V>(square.from[i] + channel) : V{};
    for (int column = 0; column < kFrom; ++column)
        Axis::map(values + column, kFrom, half + column, kFrom);
    for (int row = 0; row < kTo; ++row) Axis::map(half + row * kFrom, 1, result + row * kTo, 1);
    for (int i = 0; i < kTo * kTo; ++i) mien::store_lanes(square.to[i] + channel, result[i]);
}

template <class Axis>
void transform_channels(const Square &square, int64_t channels) {
    int64_t channel = 0;
    for (; channel + mien::kWidth<Lanes> <= channels; channel += mien::kWidth<Lanes>)
        transform<Axis, Lanes>(square, channel);
    for (; channel < channels; ++channel) transform<Axis, float>(square, channel);
}

void point_to_tile(const mien::WinogradCall &call, int64_t tile, float *points[]) {
    const int64_t step = call.num_tiles * call.channels;
    for (int i = 0; i < mien::kTilePoints; ++i)
        points[i] = call.tiles + i * step + tile * call.channels;
}

void point_to_pixels(const mien::WinogradCall &call, int64_t tile, int edge, float *points[]) {
    const int64_t across = call.tile_columns, face = tile / (call.tile_rows * across);
    const int64_t top = tile / across % call.tile_rows * 2 - call.padding;
    const int64_t left = tile % across * 2 - call.padding;
    for (int i = 0; i < edge * edge; ++i) {
        const int64_t row = top + i / edge, column = left + i % edge;
        const bool is_inside = row >= 0 && row < call.rows && column >= 0 && column < call.columns;
        const int64_t pixel = (face * call.rows + row) * call.columns + column;
        points[i] = is_inside ? call.pixels + pixel * call.channels : nullptr;
    }
}

// The nine weights of an output, or, for the way back, those that the turned kernel has there.
void point_to_kernel(const mien::WinogradCall &call, int64_t output, float *points[]) {
    for (int i = 0; i < mien::kKernelPoints; ++i) {
        const int place = call.is_turned ? mien::kKernelPoints - 1 - i : i;
        points[i] = call.pixels + (output * mien::kKernelPoints + place) * call.channels;
    }
}

template <class Axis>
void run(const mien::WinogradCall &call, int64_t first, int64_t end) {
    constexpr bool kIsToTile = Axis::kTo == 4, kIsKernel = Axis::kFrom == 3 || Axis::kTo == 3;
    for (int64_t item = first; item < end; ++item) {
        float *tile[mien::kTilePoints], *points[mien::kTilePoints];
        point_to_tile(call, item, tile);
        if (kIsKernel)
            point_to_kernel(call, item, points);
        else
            point_to_pixels(call, item, kIsToTile ? Axis::kFrom : Axis::kTo, points);
        Square square{};
        for (int i = 0; i < mien::kTilePoints; ++i) {
            square.from[i] = kIsToTile ? points[i] : tile[i];
            square.to[i] = kIsToTile ? tile[i] : points[i];
        }
        transform_channels<Axis>(square, call.channels);
    }
}

}  // namespace

namespace mien {

void MIEN_WINOGRAD_FACE(const WinogradCall &call, int64_t first, int64_t end) {
    switch (call.transform) {
        case MIEN_WINOGRAD_INPUT:
            return run<InputToTile>(call, first, end);
        case MIEN_WINOGRAD_OUTPUT:
            return run<TileToOutput>(call, first, end);
        case MIEN_WINOGRAD_GRADIENT:
            return run<GradientToTile>(call, first, end);
        case MIEN_WINOGRAD_KERNEL:
            return run<KernelToTile>(call, first, end);
        default:
            return run<TileToKernel>(call, first, end);
    }
}

}  // namespace mien
