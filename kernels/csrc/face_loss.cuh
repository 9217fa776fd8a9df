// The picture losses, a tile at a time: what the GPU kernels and the CPU threads do between two
// barriers. kernels/face_loss.py has the formulas.
//
// The second launch needs the transpose of the reflected filter G. With M = diag(1/2, 1, .., 1,
// 1/2), M G is symmetric, so G^T = M G M^-1: the first launch doubles the derivatives in the
// picture's first and last row and column, the second filters as the first did and halves what is
// there. All of it is exact.
#pragma once

#include <math.h>

#include "face_loss_filter.cuh"

namespace mien {

// Partial sums a kind on the way to the block's. Chosen on the CPU, unmeasured on a GPU.
constexpr int kParts = 16;

// To a unit or two in the last place; on a GPU the exact ones are several times as long.
MIEN_HD float reciprocal(float value) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, value);
#else
    return 1.0f / value;
#endif
}

MIEN_HD float reciprocal_root(float value) {
#if defined(__CUDA_ARCH__)
    return rsqrtf(value);
#else
    return 1.0f / sqrtf(value);
#endif
}

// ---- pixel losses: d = pred - target ----------------------------------------------------------

constexpr float kSmooth = 1.0f / 255.0f;

template <int kKind>
MIEN_HD float pixel_loss(float d) {
    const float size = fabsf(d);
    if constexpr (kKind == MIEN_MAE) return size;
    if constexpr (kKind == MIEN_MSE) return d * d;
    if constexpr (kKind == MIEN_LOGCOSH) {
        if (size > 1.0f) return size + log1pf(expf(-2.0f * size)) - 0.693147180559945309f;
        const float sinh = sinhf(size);  // cosh^2 - 1 = sinh^2: no cancellation
        return 0.5f * log1pf(sinh * sinh);
    }
    // c (1 / r - 1) = c q r / (1 + r), without the cancellation
    const float q = d * 255.0f * (d * 255.0f), r = reciprocal_root(q + 1.0f);
    return kSmooth * q * r * reciprocal(1.0f + r);
}

template <int kKind>
MIEN_HD float pixel_slope(float d) {
    if constexpr (kKind == MIEN_MAE) return d > 0.0f ? 1.0f : d < 0.0f ? -1.0f : 0.0f;
    if constexpr (kKind == MIEN_MSE) return 2.0f * d;
    if constexpr (kKind == MIEN_LOGCOSH) return tanhf(d);
    const float part = d * 255.0f;
    return part * reciprocal_root(fused(part, part, 1.0f));
}

// ---- sums -------------------------------------------------------------------------------------

struct LossSums {
    float threads[kKinds][kLossThreads];
    float parts[kKinds][kParts];
};

// The sum over a thread's run, lane by lane.
template <class Lanes, int kLength>
MIEN_HD void keep_sum(LossSums &sums, int kind, int thread, const float (&values)[kLength]) {
    float total[kWidth<Lanes>] = {};
    MIEN_UNROLL
    for (int i = 0; i < kLength; i += kWidth<Lanes>)
        for (int lane = 0; lane < kWidth<Lanes>; ++lane) total[lane] += values[i + lane];
    for (int lane = 0; lane < kWidth<Lanes>; ++lane)
        sums.threads[kind][thread * kWidth<Lanes> + lane] = total[lane];
}

template <class Lanes, int kKind, int kLength>
MIEN_HD void keep_pixel_sum(const LossCall &call, LossSums &sums, int thread,
                            const float (&x)[kLength], const float (&y)[kLength],
                            const float (&weights)[kLength]) {
    if (!call.asked[kKind]) return;
    float values[kLength];
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i) values[i] = weights[i] * pixel_loss<kKind>(x[i] - y[i]);
    keep_sum<Lanes>(sums, kKind, thread, values);
}

template <class Lanes, int kLength>
MIEN_HD void keep_pixel_sums(const LossCall &call, LossSums &sums, int thread,
                             const float (&x)[kLength], const float (&y)[kLength],
                             const float (&weights)[kLength]) {
    keep_pixel_sum<Lanes, MIEN_MAE>(call, sums, thread, x, y, weights);
    keep_pixel_sum<Lanes, MIEN_MSE>(call, sums, thread, x, y, weights);
    keep_pixel_sum<Lanes, MIEN_LOGCOSH>(call, sums, thread, x, y, weights);
    keep_pixel_sum<Lanes, MIEN_SMOOTH_LOSS>(call, sums, thread, x, y, weights);
}

template <int kKind, int kLength>
MIEN_HD void add_pixel_slope(const LossCall &call, const float (&x)[kLength],
                             const float (&y)[kLength], const float (&weights)[kLength],
                             float (&gradient)[kLength]) {
    if (!call.asked[kKind]) return;
    const float share = call.shares[kKind];
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i)
        gradient[i] = fused(share * weights[i], pixel_slope<kKind>(x[i] - y[i]), gradient[i]);
}

template <int kLength>
MIEN_HD void add_pixel_slopes(const LossCall &call, const float (&x)[kLength],
                              const float (&y)[kLength], const float (&weights)[kLength],
                              float (&gradient)[kLength]) {
    add_pixel_slope<MIEN_MAE>(call, x, y, weights, gradient);
    add_pixel_slope<MIEN_MSE>(call, x, y, weights, gradient);
    add_pixel_slope<MIEN_LOGCOSH>(call, x, y, weights, gradient);
    add_pixel_slope<MIEN_SMOOTH_LOSS>(call, x, y, weights, gradient);
}

// thread: 0 .. kLossThreads - 1, of which kKinds * kParts have work.
MIEN_HD void add_up_parts(const LossCall &call, int thread, LossSums &sums) {
    constexpr int kEach = kLossThreads / kParts;
    const int kind = thread / kParts, part = thread % kParts;
    if (kind >= kKinds || !call.asked[kind]) return;
    float total = 0.0f;
    MIEN_UNROLL
    for (int i = 0; i < kEach; ++i) total += sums.threads[kind][part * kEach + i];
    sums.parts[kind][part] = total;
}

// thread: as above, of which kKinds have work.
MIEN_HD void add_up_block(const LossCall &call, int64_t num_blocks, int64_t block, int thread,
                          const LossSums &sums) {
    if (thread >= kKinds || !call.asked[thread]) return;
    float total = 0.0f;
    MIEN_UNROLL
    for (int i = 0; i < kParts; ++i) total += sums.parts[thread][i];
    call.partials[thread * num_blocks + block] = total;
}

// ---- the first launch -------------------------------------------------------------------------

struct ForwardShared {
    TileMaps<kPictureMaps> maps;
    LossSums sums;
};

MIEN_HD int side_of(const LossCall &call, int64_t face) { return face < call.batch ? 0 : 1; }

// Numbers from the start of a side's tensor to the face's.
MIEN_HD int64_t start_in_side(const LossCall &call, int64_t face) {
    return (face < call.batch ? face : face - call.batch) * call.height * call.length;
}

template <class Lanes, int kChannels, class RawPred, class RawTarget>
MIEN_HD void picture_columns(const LossCall &call, const Tile &tile, int thread,
                             ForwardShared &shared) {
    const int first = tile.first - kMargin + thread * kWidth<Lanes>;
    const auto *preds = static_cast<const RawPred *>(call.preds[side_of(call, tile.face)]);
    const auto *targets = static_cast<const RawTarget *>(call.target);
    const PictureRows<Lanes, RawPred, RawTarget> source{
        preds + start_in_side(call, tile.face),
        targets + tile.face * call.height * call.length,
        call.pred_type,
        call.target_type,
        place_in_row<Lanes, kChannels>(call, first),
    };
    filter_columns<Lanes>(call, tile, source, call.length, thread, shared.maps);
}

// 1 - SSIM of one number, and its derivatives, of the filtered maps of x - 1/2 and y - 1/2.
struct Similarity {
    float loss;
    float by_mean, by_product, by_squares;  // by_squares doubled
};

MIEN_HD Similarity similarity_of(float mean_x, float mean_y, float mean_xy, float mean_squares) {
    constexpr float kC1 = 0.01f * 0.01f, kC2 = 0.03f * 0.03f;
    const float x = mean_x + 0.5f, y = mean_y + 0.5f;
    const float inverse_luminance = reciprocal(fused(x, x, y * y) + kC1);
    const float luminance = fused(2.0f * x, y, kC1) * inverse_luminance;
    const float variance = mean_squares - fused(mean_x, mean_x, mean_y * mean_y);
    const bool held = variance <= 0.0f;
    const float inverse_contrast = reciprocal((held ? 0.0f : variance) + kC2);
    const float contrast = fused(2.0f, fused(-mean_x, mean_y, mean_xy), kC2) * inverse_contrast;
    const float moving = held ? 0.0f : contrast;
    Similarity s;
    s.loss = fused(-luminance, contrast, 1.0f);
    s.by_mean = -2.0f * (contrast * inverse_luminance * fused(-luminance, x, y) +
                         luminance * inverse_contrast * fused(moving, mean_x, -mean_y));
    s.by_product = -2.0f * luminance * inverse_contrast;
    s.by_squares = 2.0f * luminance * inverse_contrast * moving;
    return s;
}

template <class Lanes, int kChannels>
MIEN_HD void picture_rows(const LossCall &call, const Tile &tile, int thread,
                          ForwardShared &shared) {
    constexpr int kLength = Run<Lanes>::kLength;
    const Run<Lanes> run = run_of<Lanes, kChannels>(call, tile, thread);
    float maps[kPictureMaps][kLength], weights[kLength], doubled[kLength], values[kLength];
    load_weights<kChannels>(call, tile.face, run.x, run.y, run.count, weights);
    filter_run<Lanes, kChannels>(shared.maps, run, maps);
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i) doubled[i] = weights[i];
    scale_border<kChannels>(call, run.x, run.y, 2.0f, doubled);
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i) {
        const Similarity s = similarity_of(maps[0][i], maps[1][i], maps[2][i], maps[3][i]);
        values[i] = weights[i] * s.loss;
        maps[0][i] = doubled[i] * s.by_mean;
        maps[1][i] = doubled[i] * s.by_product;
        maps[2][i] = doubled[i] * s.by_squares;
    }
    keep_sum<Lanes>(shared.sums, MIEN_SSIM, thread, values);
    const int64_t plane = 2 * call.batch * call.height * call.stride;
    const int64_t row = tile.face * call.height + run.y;
    float *slopes = call.slopes + row * call.stride + tile.first + run.start;
    MIEN_UNROLL
    for (int map = 0; map < kSlopeMaps; ++map)
        store_run(slopes + map * plane, MIEN_FLOAT32, run.count, true, maps[map]);
    if (!asks_for_pixels(call)) return;
    float x[kLength], y[kLength];
    load_run(call.preds[side_of(call, tile.face)], call.pred_type,
             start_in_side(call, tile.face) + run.at, run.count, call.wide, x);
    load_run(call.target, call.target_type, tile.face * call.height * call.length + run.at,
             run.count, call.wide, y);
    keep_pixel_sums<Lanes>(call, shared.sums, thread, x, y, weights);
}

// Without SSIM: the sums and the gradient at once.
template <class Lanes, int kChannels>
MIEN_HD void pixel_rows(const LossCall &call, const Tile &tile, int thread, LossSums &sums) {
    constexpr int kLength = Run<Lanes>::kLength;
    const Run<Lanes> run = run_of<Lanes, kChannels>(call, tile, thread);
    float x[kLength], y[kLength], weights[kLength], gradient[kLength] = {};
    const int side = side_of(call, tile.face);
    const int64_t at = start_in_side(call, tile.face) + run.at;
    load_weights<kChannels>(call, tile.face, run.x, run.y, run.count, weights);
    load_run(call.preds[side], call.pred_type, at, run.count, call.wide, x);
    load_run(call.target, call.target_type, tile.face * call.height * call.length + run.at,
             run.count, call.wide, y);
    keep_pixel_sums<Lanes>(call, sums, thread, x, y, weights);
    add_pixel_slopes(call, x, y, weights, gradient);
    store_gradient(call, side, at, run.count, gradient);
}

// ---- the second launch ------------------------------------------------------------------------

struct GradientShared {
    TileMaps<kSlopeMaps> maps;
};

template <class Lanes, int kChannels>
MIEN_HD void slope_columns(const LossCall &call, const Tile &tile, int thread,
                           GradientShared &shared) {
    const int first = tile.first - kMargin + thread * kWidth<Lanes>;
    const SlopeRows<Lanes> source{call.slopes + tile.face * call.height * call.stride,
                                  2 * call.batch * call.height * call.stride,
                                  place_in_row<Lanes, kChannels>(call, first)};
    filter_columns<Lanes>(call, tile, source, call.stride, thread, shared.maps);
}

template <class Lanes, int kChannels>
MIEN_HD void slope_rows(const LossCall &call, const Tile &tile, int thread,
                        GradientShared &shared) {
    constexpr int kLength = Run<Lanes>::kLength;
    const Run<Lanes> run = run_of<Lanes, kChannels>(call, tile, thread);
    const int side = side_of(call, tile.face);
    const int64_t at = start_in_side(call, tile.face) + run.at;
    float maps[kSlopeMaps][kLength], x[kLength], y[kLength], gradient[kLength];
    load_run(call.preds[side], call.pred_type, at, run.count, call.wide, x);
    load_run(call.target, call.target_type, tile.face * call.height * call.length + run.at,
             run.count, call.wide, y);
    filter_run<Lanes, kChannels>(shared.maps, run, maps);
    const float share = call.shares[MIEN_SSIM];
    MIEN_UNROLL
    for (int i = 0; i < kLength; ++i)
        gradient[i] =
            share * fused(x[i] - 0.5f, maps[2][i], fused(y[i] - 0.5f, maps[1][i], maps[0][i]));
    scale_border<kChannels>(call, run.x, run.y, 0.5f, gradient);
    if (asks_for_pixels(call)) {
        float weights[kLength];
        load_weights<kChannels>(call, tile.face, run.x, run.y, run.count, weights);
        add_pixel_slopes(call, x, y, weights, gradient);
    }
    store_gradient(call, side, at, run.count, gradient);
}

// ---- means ------------------------------------------------------------------------------------

struct MeansShared {
    double threads[2][MIEN_MAX_LOSSES][kLossThreads];
};

// thread: 0 .. kLossThreads - 1.
MIEN_HD void add_up_means(const LossCall &call, int thread, MeansShared &shared) {
    const int64_t side_blocks = call.batch * call.tiles_x * call.tiles_y;
    for (int side = 0; side < 2; ++side) {
        for (int loss = 0; loss < call.num_losses; ++loss) {
            const float *partials = call.partials + (2 * call.kinds[loss] + side) * side_blocks;
            double total = 0.0;
            MIEN_ROLLED
            for (int64_t i = thread; i < side_blocks; i += kLossThreads) total += partials[i];
            shared.threads[side][loss][thread] = total;
        }
    }
}

// thread: as above, of which 2 * num_losses have work.
MIEN_HD void store_means(const LossCall &call, int thread, const MeansShared &shared) {
    if (thread >= 2 * call.num_losses) return;
    const int side = thread / call.num_losses, loss = thread % call.num_losses;
    double total = 0.0;
    MIEN_ROLLED
    for (int i = 0; i < kLossThreads; ++i) total += shared.threads[side][loss][i];
    const double count = static_cast<double>(call.batch) * call.height * call.length;
    call.means[thread] = static_cast<float>(total / count);
}

}  // namespace mien
