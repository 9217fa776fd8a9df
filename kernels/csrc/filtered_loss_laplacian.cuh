// laploss of a plane; core/losses/pyramids.py has the formula.
#pragma once

#include "filtered_loss_team.cuh"

namespace mien {

constexpr int kLaplacianSteps = 5;  // and one level more
constexpr int kLaplacianMaps = 2, kLaplacianWholeMaps = 5;

struct LaplacianFilters {
    const Filter *blur, *reduce, *enlarge;
};

MIEN_HD LaplacianFilters laplacian_filters(const FilteredCall &call) {
    return {call.filters, call.filters + kLaplacianSteps, call.filters + 2 * kLaplacianSteps};
}

// From the finest level to the coarsest: what the blur takes away, and the next picture.
template <class Lanes>
MIEN_HD void take_apart(const FilteredCall &call, const Team &team, Lanes *pictures, Lanes *levels,
                        Lanes *between) {
    const LaplacianFilters filters = laplacian_filters(call);
    for (int level = 0; level < kLaplacianSteps; ++level) {
        const int size = call.sizes[level];
        const int64_t map = start_of(call, level);
        const Band &blur = filters.blur[level].forward;
        filter_columns(team, blur, pictures + map, size, between);
        for_pixels(team, size, size, [&](int y) {
            const int64_t start = int64_t{y} * size;
            return [=, &blur](int x) {
                levels[map + start + x] =
                    pictures[map + start + x] - product(line_of(blur, x), between + start, 1);
            };
        });
        filter_both(team, filters.reduce[level].forward, pictures + map, between,
                    pictures + start_of(call, level + 1));
    }
}

// From the coarsest level to the finest: the gradient by the picture, in its place.
template <class Lanes>
MIEN_HD void put_together(const FilteredCall &call, const Team &team, Lanes *pictures,
                          const Lanes *levels, Lanes *between, Lanes *below) {
    const LaplacianFilters filters = laplacian_filters(call);
    for (int level = kLaplacianSteps - 1; level >= 0; --level) {
        const int size = call.sizes[level], next_size = call.sizes[level + 1];
        const int64_t map = start_of(call, level);
        const Band &blur = filters.blur[level].transposed;
        const Band &reduce = filters.reduce[level].transposed;
        filter_columns(team, blur, levels + map, size, between);
        filter_columns(team, reduce, pictures + start_of(call, level + 1), next_size, below);
        for_pixels(team, size, size, [&](int y) {
            const int64_t start = int64_t{y} * size;
            const Lanes *next = below + int64_t{y} * next_size;
            return [=, &blur, &reduce](int x) {
                pictures[map + start + x] = levels[map + start + x] -
                                            product(line_of(blur, x), between + start, 1) +
                                            product(line_of(reduce, x), next, 1);
            };
        });
    }
}

template <class Lanes>
MIEN_HD void laploss(const FilteredCall &call, const Team &team, const Planes<Lanes> &planes,
                     Lanes *room) {
    const int size = call.size;
    const int64_t area = area_of(call, 0), pyramid = start_of(call, kLaplacianSteps + 1);
    Lanes *pictures = room, *levels = room + pyramid, *weight = levels + pyramid;
    Lanes *less = weight + area, *value = less + area, *between = value + area;
    Lanes *below = between + area, *totals = below + area;
    for_pixels(team, size, size, [&](int y) {
        return [=](int x) {
            const int64_t at = int64_t{y} * size + x;
            pictures[at] = load(planes.pred, at) - load(planes.target, at);
            weight[at] = load(planes.weight, at);
        };
    });
    take_apart(call, team, pictures, levels, between);
    float share = 1.0f;
    for (int level = 0; level <= kLaplacianSteps; ++level, share *= 0.25f) {
        const int level_size = call.sizes[level];
        // To weigh an enlarged level is to weigh the level with what the transpose makes of
        // weights.
        const Lanes *weights = level == 0 ? weight : less;
        if (level > 0)
            filter_both(team, laplacian_filters(call).enlarge[level - 1].transposed, weight,
                        between, less);
        Lanes *map = (level < kLaplacianSteps ? levels : pictures) + start_of(call, level);
        for_pixels(team, level_size, level_size, [&](int y) {
            return [=](int x) {
                const int64_t at = int64_t{y} * level_size + x;
                const Lanes detail = map[at], own = weights[at] * share;
                const Lanes none{};
                value[at] = own * absolute(detail);
                map[at] = detail > 0.0f ? own : detail < 0.0f ? -own : none;
            };
        });
        add_up(team, value, level_size, level == 0, totals);
    }
    put_together(call, team, pictures, levels, between, below);
    store_gradient(call, team, planes, pictures);
    store_value(call, team, planes, totals);
}

}  // namespace mien
