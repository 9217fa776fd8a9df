// pixel_gradient_diff and gmsd of a plane; core/losses/gradients.py has the formulas.
#pragma once

#include "filtered_loss_team.cuh"

namespace mien {

// ---- pixel_gradient_diff ----------------------------------------------------------------------

template <class Lanes>
struct Robust {
    Lanes value, slope;
};

// A (u^(alpha / 2) - 1) with A = c (2 - alpha) / alpha, u = 1 + x^2 / (c^2 (2 - alpha)), alpha
// 1.9999, c 1/255. With p = u^(alpha / 2 - 1), which is e to a power of -0.0011..0, this is
// A ((u - 1) p + (p - 1)), and its slope x p / c: nothing cancels.
template <class Lanes>
MIEN_HD Robust<Lanes> robust(Lanes x) {
    constexpr float kDistance = 1.0e-4f, kAlpha = 1.9999f, kInverse = 255.0f;
    const Lanes square = x * x * (kInverse * kInverse / kDistance);
    const Lanes power = log_of(square + 1.0f) * (-0.5f * kDistance);
    const Lanes less = fused(power * power, fused(power, 1.0f / 6.0f, same_in_all<Lanes>(0.5f)),
                             power);  // p - 1
    return {(fused(square, less, square) + less) * (kDistance / kAlpha / kInverse),
            fused(x, less, x) * kInverse};
}

constexpr int kDifferenceMaps = 8;

template <class Lanes>
MIEN_HD void pixel_gradient_diff(const FilteredCall &call, const Team &team,
                                 const Planes<Lanes> &planes, Lanes *room) {
    const int size = call.size;
    const int64_t area = int64_t{size} * size;
    const Filter &first = call.filters[0], &second = call.filters[1];
    Lanes *difference = room, *buffer = room + area, *value = room + 2 * area;
    Lanes *slopes = room + 3 * area, *totals = room + 8 * area;
    enum { kRow, kColumn, kRows, kColumns, kBoth };
    for_pixels(team, size, size, [&](int y) {
        return [=](int x) {
            const int64_t at = int64_t{y} * size + x;
            difference[at] = load(planes.pred, at) - load(planes.target, at);
        };
    });
    const auto differences_by_row = [&](int y) {
        const Line line = line_of(first.forward, y);
        Lanes *by_row = buffer + kept_row(y, size);
        return [=](int x) { by_row[x] = product(line, difference + x, size); };
    };
    for_rows(team, size, size, differences_by_row, size, [&](int y) {
        const Line rows = line_of(second.forward, y);
        const Lanes *by_row = buffer + kept_row(y, size);
        const int64_t start = int64_t{y} * size;
        return [=, &first, &second](int x) {
            const int64_t at = start + x;
            const Line one = line_of(first.forward, x), two = line_of(second.forward, x);
            const Robust<Lanes> row = robust(by_row[x]);
            const Robust<Lanes> column = robust(product(one, difference + start, 1));
            const Robust<Lanes> twice = robust(product(rows, difference + x, size));
            const Robust<Lanes> columns = robust(product(two, difference + start, 1));
            const Robust<Lanes> both = robust(product(one, by_row, 1));
            const Lanes weight = load(planes.weight, at), half = weight * 0.5f;
            const Lanes ones = row.value + column.value + (twice.value + columns.value);
            value[at] = fused(half, ones, weight * both.value);
            slopes[kRow * area + at] = half * row.slope;
            slopes[kColumn * area + at] = half * column.slope;
            slopes[kRows * area + at] = half * twice.slope;
            slopes[kColumns * area + at] = half * columns.slope;
            slopes[kBoth * area + at] = weight * both.slope;
        };
    });
    add_up(team, value, size, true, totals);
    const auto slopes_of_both = [&](int y) {
        const Line line = line_of(first.transposed, y);
        Lanes *both = buffer + kept_row(y, size);
        return [=](int x) { both[x] = product(line, slopes + kBoth * area + x, size); };
    };
    const float share = share_of(call);
    for_rows(team, size, size, slopes_of_both, size, [&](int y) {
        const Lanes *both = buffer + kept_row(y, size);
        const Line one = line_of(first.transposed, y), two = line_of(second.transposed, y);
        const int64_t start = int64_t{y} * size;
        return [=, &first, &second](int x) {
            const Lanes *row = slopes + start;
            const Line one_along = line_of(first.transposed, x);
            const Lanes down = product(one, slopes + kRow * area + x, size) +
                               product(two, slopes + kRows * area + x, size);
            const Lanes along = product(one_along, row + kColumn * area, 1) +
                                product(line_of(second.transposed, x), row + kColumns * area, 1);
            const Lanes sum = down + along + product(one_along, both, 1);
            store(planes.gradient, planes.count, start + x, sum * share);
        };
    });
    store_value(call, team, planes, totals);
}

// ---- gmsd -------------------------------------------------------------------------------------

// 1 - similarity of two edges, and its slope by the first: without a cancellation.
template <class Lanes>
MIEN_HD Robust<Lanes> edge_difference(Lanes x, Lanes y) {
    const Lanes difference = x - y, inverse = 1.0f / (fused(x, x, y * y) + 0.0025f);
    const Lanes value = difference * difference * inverse;
    return {value, 2.0f * inverse * fused(-x, value, difference)};
}

// Edges are sums of two separable filters: number k acts on the columns where k ^ 1 acts on the
// rows; even ones make the edges across, odd ones those along.
constexpr int kEdgeFilters = 4;
constexpr int kEdgeMaps = 5 + 2 * kEdgeFilters;

template <class Lanes>
struct Edges {
    Lanes across, along;
};

template <class Lanes>
MIEN_HD Edges<Lanes> edges_of(const Line (&rows)[kEdgeFilters], const Lanes *columns,
                              int64_t area) {
    return {product(rows[1], columns, 1) + product(rows[3], columns + 2 * area, 1),
            product(rows[0], columns + area, 1) + product(rows[2], columns + 3 * area, 1)};
}

template <class Lanes>
MIEN_HD void gmsd(const FilteredCall &call, const Team &team, const Planes<Lanes> &planes,
                  Lanes *room) {
    const int size = call.size;
    const int64_t area = int64_t{size} * size;
    const auto &filters = call.filters;
    Lanes *pred = room, *target = room + area, *value = room + 2 * area;
    Lanes *across = room + 3 * area, *along = room + 4 * area;  // slopes
    Lanes *of_pred = room + 5 * area, *of_target = of_pred + kEdgeFilters * area;
    Lanes *totals = room + kEdgeMaps * area;
    for_pixels(team, size, size, [&](int y) {
        return [=](int x) {
            const int64_t at = int64_t{y} * size + x;
            pred[at] = load(planes.pred, at);
            target[at] = load(planes.target, at);
        };
    });
    const auto columns = [&](int y) {
        const int64_t kept = kept_row(y, size);
        return [=, &filters](int x) {
            MIEN_UNROLL
            for (int k = 0; k < kEdgeFilters; ++k) {
                const Line line = line_of(filters[k].forward, y);
                of_pred[k * area + kept + x] = product(line, pred + x, size);
                of_target[k * area + kept + x] = product(line, target + x, size);
            }
        };
    };
    for_rows(team, size, size, columns, size, [&](int y) {
        const int64_t start = int64_t{y} * size, kept = kept_row(y, size);
        return [=, &filters](int x) {
            Line rows[kEdgeFilters];
            MIEN_UNROLL
            for (int k = 0; k < kEdgeFilters; ++k) rows[k] = line_of(filters[k].forward, x);
            const Edges<Lanes> ours = edges_of(rows, of_pred + kept, area);
            const Edges<Lanes> wanted = edges_of(rows, of_target + kept, area);
            const Robust<Lanes> one = edge_difference(ours.across, wanted.across);
            const Robust<Lanes> other = edge_difference(ours.along, wanted.along);
            const Lanes half = load(planes.weight, start + x) * 0.5f;
            value[start + x] = half * (one.value + other.value);
            across[start + x] = half * one.slope;
            along[start + x] = half * other.slope;
        };
    });
    add_up(team, value, size, true, totals);
    const auto slope_columns = [&](int y) {
        const int64_t kept = kept_row(y, size);
        return [=, &filters](int x) {
            MIEN_UNROLL
            for (int k = 0; k < kEdgeFilters; ++k) {
                const Line line = line_of(filters[k].transposed, y);
                of_pred[k * area + kept + x] = product(line, (k & 1 ? along : across) + x, size);
            }
        };
    };
    const float share = share_of(call);
    for_rows(team, size, size, slope_columns, size, [&](int y) {
        const int64_t kept = kept_row(y, size);
        return [=, &filters](int x) {
            Lanes sum{};
            MIEN_UNROLL
            for (int k = 0; k < kEdgeFilters; ++k)
                sum += product(line_of(filters[k ^ 1].transposed, x), of_pred + k * area + kept, 1);
            store(planes.gradient, planes.count, int64_t{y} * size + x, sum * share);
        };
    });
    store_value(call, team, planes, totals);
}

}  // namespace mien
