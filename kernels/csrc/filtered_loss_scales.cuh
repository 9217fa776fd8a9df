// ms_ssim of a plane; core/losses/pyramids.py has the formula.
#pragma once

#include "filtered_loss_team.cuh"

namespace mien {

constexpr int kScales = 5;
constexpr int kScaleMaps = 6, kScaleWholeMaps = 4 + (kScales - 1) + 1;

struct ScaleFilters {
    const Filter *blur, *reduce, *enlarge;
};

MIEN_HD ScaleFilters scale_filters(const FilteredCall &call) {
    return {call.filters, call.filters + kScales, call.filters + 2 * kScales - 1};
}

// Maps of every scale, and of the whole picture. Pictures are kept less 1/2: smaller numbers have
// smaller roundings, and windows of equal pictures no variance.
template <class Lanes>
struct ScaleRoom {
    Lanes *pred, *target, *similarity, *by_mean, *by_product, *by_squares;
    Lanes *columns;  // four
    Lanes *slopes;   // by the enlarged similarities of all scales but the first
    Lanes *value, *totals;
};

template <class Lanes>
MIEN_HD ScaleRoom<Lanes> scale_room(const FilteredCall &call, Lanes *room) {
    const int64_t area = area_of(call, 0), pyramid = start_of(call, kScales);
    Lanes *whole = room + kScaleMaps * pyramid;
    return {room,
            room + pyramid,
            room + 2 * pyramid,
            room + 3 * pyramid,
            room + 4 * pyramid,
            room + 5 * pyramid,
            whole,
            whole + 4 * area,
            whole + (kScaleWholeMaps - 1) * area,
            whole + kScaleWholeMaps * area};
}

template <class Lanes>
struct Moments {
    Lanes pred, target, product, squares;
};

// Blurred down a column: both pictures, their product and the sum of their squares.
template <class Lanes>
MIEN_HD Moments<Lanes> moments(const Line &line, const Lanes *pred, const Lanes *target, int step) {
    Moments<Lanes> sums{};
    for (int k = 0; k < line.count; ++k) {
        const int64_t at = int64_t{line.first + k} * step;
        const Lanes x = pred[at], y = target[at];
        const float tap = line.taps[k];
        sums.pred = fused(x, tap, sums.pred);
        sums.target = fused(y, tap, sums.target);
        sums.product = fused(x * y, tap, sums.product);
        sums.squares = fused(fused(x, x, y * y), tap, sums.squares);
    }
    return sums;
}

// Similarity of a window and its derivatives by the blurred prediction, product and squares.
template <class Lanes>
struct WindowSimilarity {
    Lanes value, by_mean, by_product, by_squares;
};

template <class Lanes>
MIEN_HD WindowSimilarity<Lanes> contrast_of(const Moments<Lanes> &m) {
    constexpr float kC2 = 0.03f * 0.03f;
    const Lanes variance = m.squares - fused(m.pred, m.pred, m.target * m.target), none{};
    const auto held = variance <= 0.0f;
    const Lanes inverse = 1.0f / ((held ? none : variance) + kC2);
    const Lanes covariance = fused(-m.pred, m.target, m.product);
    const Lanes contrast = fused(covariance, 2.0f, same_in_all<Lanes>(kC2)) * inverse;
    const Lanes moving = held ? none : contrast;
    return {contrast, 2.0f * inverse * fused(moving, m.pred, -m.target), 2.0f * inverse,
            -inverse * moving};
}

// Times the similarity of the means, of pictures that are not less 1/2.
template <class Lanes>
MIEN_HD WindowSimilarity<Lanes> with_luminance(const Moments<Lanes> &m,
                                               const WindowSimilarity<Lanes> &of_contrast) {
    constexpr float kC1 = 0.01f * 0.01f;
    const Lanes x = m.pred + 0.5f, y = m.target + 0.5f;
    const Lanes inverse = 1.0f / (fused(x, x, y * y) + kC1);
    const Lanes luminance = fused(x * y, 2.0f, same_in_all<Lanes>(kC1)) * inverse;
    const Lanes by_mean = 2.0f * inverse * fused(-luminance, x, y);
    return {luminance * of_contrast.value,
            fused(luminance, of_contrast.by_mean, of_contrast.value * by_mean),
            luminance * of_contrast.by_product, luminance * of_contrast.by_squares};
}

// The similarity of every window of a scale, and its derivatives.
template <class Lanes>
MIEN_HD void compare_scale(const FilteredCall &call, const Team &team, int scale,
                           const ScaleRoom<Lanes> &room) {
    const int size = call.sizes[scale];
    const int64_t map = start_of(call, scale), area = area_of(call, scale);
    const Band &blur = scale_filters(call).blur[scale].forward;
    const auto blurred_columns = [&](int y) {
        const Line line = line_of(blur, y);
        Lanes *columns = room.columns + kept_row(y, size);
        const Lanes *pred = room.pred + map, *target = room.target + map;
        return [=](int x) {
            const Moments<Lanes> m = moments(line, pred + x, target + x, size);
            columns[x] = m.pred;
            columns[area + x] = m.target;
            columns[2 * area + x] = m.product;
            columns[3 * area + x] = m.squares;
        };
    };
    const bool is_whole = scale == kScales - 1;
    for_rows(team, size, size, blurred_columns, size, [&](int y) {
        const Lanes *columns = room.columns + kept_row(y, size);
        const int64_t start = map + int64_t{y} * size;
        return [=, &blur](int x) {
            const Line line = line_of(blur, x);
            const Moments<Lanes> m{product(line, columns, 1), product(line, columns + area, 1),
                                   product(line, columns + 2 * area, 1),
                                   product(line, columns + 3 * area, 1)};
            WindowSimilarity<Lanes> s = contrast_of(m);
            if (is_whole) s = with_luminance(m, s);
            room.similarity[start + x] = s.value;
            room.by_mean[start + x] = s.by_mean;
            room.by_product[start + x] = s.by_product;
            room.by_squares[start + x] = s.by_squares;
        };
    });
}

struct Exponents {
    float at[kScales];
};
MIEN_HD constexpr Exponents exponents() { return {{0.0448f, 0.2856f, 0.3001f, 0.2363f, 0.1333f}}; }

// The product of powers of similarities, each of which is a line to 0 below a millionth; its slopes
// take the places of the similarities.
template <class Lanes>
MIEN_HD Lanes product_of_powers(Lanes (&similarities)[kScales]) {
    constexpr float kLeast = 1e-6f;
    constexpr Exponents powers = exponents();
    const Lanes least = same_in_all<Lanes>(kLeast), one = same_in_all<Lanes>(1.0f), none{};
    Lanes logarithm{}, lines[kScales], slopes[kScales], before[kScales];
    Lanes line = one;
    MIEN_UNROLL
    for (int scale = 0; scale < kScales; ++scale) {
        const Lanes s = similarities[scale];
        const auto is_above = s > least;
        const Lanes held = is_above ? s : least;
        logarithm = fused(log_of(held), powers.at[scale], logarithm);
        lines[scale] = is_above ? one : larger_of(s, none) * (1.0f / kLeast);
        slopes[scale] = is_above ? powers.at[scale] / s : s > none ? one * (1.0f / kLeast) : none;
        before[scale] = line;
        line = line * lines[scale];
    }
    const Lanes powered = exp_of(logarithm);
    Lanes behind = powered;
    MIEN_UNROLL
    for (int scale = kScales - 1; scale >= 0; --scale) {
        similarities[scale] = before[scale] * behind * slopes[scale];
        behind = behind * lines[scale];
    }
    return powered * line;
}

// The weighted map, and its slopes by the similarities of all scales, enlarged.
template <class Lanes>
MIEN_HD void multiply_scales(const FilteredCall &call, const Team &team,
                             const Planes<Lanes> &planes, const ScaleRoom<Lanes> &room) {
    const int size = call.size;
    const int64_t area = area_of(call, 0);
    const Filter *enlarge = scale_filters(call).enlarge;
    const auto enlarged_columns = [&](int y) {
        return [=, &call](int x) {
            MIEN_UNROLL
            for (int scale = 1; scale < kScales; ++scale) {
                const int length = call.sizes[scale];
                if (x >= length) continue;
                Lanes *kept = room.columns + (scale - 1) * area + kept_row(y, length);
                kept[x] = product(line_of(enlarge[scale - 1].forward, y),
                                  room.similarity + start_of(call, scale) + x, length);
            }
        };
    };
    for_rows(team, size, call.sizes[1], enlarged_columns, size, [&](int y) {
        const int64_t start = int64_t{y} * size;
        return [=, &call](int x) {
            Lanes similarities[kScales];
            similarities[0] = room.similarity[start + x];
            MIEN_UNROLL
            for (int scale = 1; scale < kScales; ++scale)
                similarities[scale] =
                    product(line_of(enlarge[scale - 1].forward, x),
                            room.columns + (scale - 1) * area + kept_row(y, call.sizes[scale]), 1);
            const Lanes weight = load(planes.weight, start + x);
            room.value[start + x] = weight * (1.0f - product_of_powers(similarities));
            room.similarity[start + x] = -weight * similarities[0];
            MIEN_UNROLL
            for (int scale = 1; scale < kScales; ++scale)
                room.slopes[(scale - 1) * area + start + x] = -weight * similarities[scale];
        };
    });
}

// The gradient by the prediction of a scale takes the place of its similarity.
template <class Lanes>
MIEN_HD void return_scale(const FilteredCall &call, const Team &team, int scale,
                          const ScaleRoom<Lanes> &room) {
    const int size = call.sizes[scale];
    const int64_t map = start_of(call, scale), area = area_of(call, scale);
    const ScaleFilters filters = scale_filters(call);
    Lanes *similarity = room.similarity + map, *below = room.columns + 3 * area_of(call, 0);
    if (scale > 0)
        filter(team, filters.enlarge[scale - 1].transposed,
               room.slopes + (scale - 1) * area_of(call, 0), room.columns, similarity);
    for_pixels(team, size, size, [&](int y) {
        return [=](int x) {
            const int64_t at = map + int64_t{y} * size + x;
            const Lanes slope = room.similarity[at];
            room.by_mean[at] *= slope;
            room.by_product[at] *= slope;
            room.by_squares[at] *= slope;
        };
    });
    const Band &blur = filters.blur[scale].transposed;
    const bool is_last = scale == kScales - 1;
    const Band &reduce = filters.reduce[is_last ? 0 : scale].transposed;
    const int next_size = is_last ? 0 : call.sizes[scale + 1];
    const Lanes *next = room.similarity + start_of(call, scale + 1);
    const auto blurred_columns = [&](int y) {
        const Line line = line_of(blur, y), of_reduce = line_of(reduce, is_last ? 0 : y);
        Lanes *columns = room.columns + kept_row(y, size);
        Lanes *spread = below + kept_row(y, next_size);
        return [=](int x) {
            columns[x] = product(line, room.by_mean + map + x, size);
            columns[area + x] = product(line, room.by_product + map + x, size);
            columns[2 * area + x] = product(line, room.by_squares + map + x, size);
            if (x < next_size) spread[x] = product(of_reduce, next + x, next_size);
        };
    };
    for_rows(team, size, size, blurred_columns, size, [&](int y) {
        const Lanes *columns = room.columns + kept_row(y, size);
        const Lanes *spread = below + kept_row(y, next_size);
        const int64_t start = map + int64_t{y} * size;
        return [=, &blur, &reduce](int x) {
            const Line line = line_of(blur, x);
            const Lanes by_product = product(line, columns + area, 1);
            const Lanes by_squares = product(line, columns + 2 * area, 1);
            Lanes sum = fused(room.target[start + x], by_product, product(line, columns, 1));
            sum = fused(room.pred[start + x] * 2.0f, by_squares, sum);
            if (!is_last) sum += product(line_of(reduce, x), spread, 1);
            room.similarity[start + x] = sum;
        };
    });
}

template <class Lanes>
MIEN_HD void ms_ssim(const FilteredCall &call, const Team &team, const Planes<Lanes> &planes,
                     Lanes *numbers) {
    const int size = call.size;
    const ScaleRoom<Lanes> room = scale_room(call, numbers);
    for_pixels(team, size, size, [&](int y) {
        return [=](int x) {
            const int64_t at = int64_t{y} * size + x;
            room.pred[at] = load(planes.pred, at) - 0.5f;
            room.target[at] = load(planes.target, at) - 0.5f;
        };
    });
    MIEN_UNROLL
    for (int scale = 0; scale < kScales; ++scale) {
        if (scale > 0) {
            const Band &reduce = scale_filters(call).reduce[scale - 1].forward;
            const int64_t from = start_of(call, scale - 1), to = start_of(call, scale);
            filter(team, reduce, room.pred + from, room.columns, room.pred + to);
            filter(team, reduce, room.target + from, room.columns, room.target + to);
        }
        compare_scale(call, team, scale, room);
    }
    multiply_scales(call, team, planes, room);
    add_up(team, room.value, size, true, room.totals);
    MIEN_UNROLL
    for (int scale = kScales - 1; scale >= 0; --scale) return_scale(call, team, scale, room);
    store_gradient(call, team, planes, room.similarity);
    store_value(call, team, planes, room.totals);
}

}  // namespace mien
