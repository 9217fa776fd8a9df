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
                        Lanes *buffer) {
    const LaplacianFilters filters = laplacian_filters(call);
    for (int level = 0; level < kLaplacianSteps; ++level) {
        const int size = call.sizes[level];
        const int64_t map = start_of(call, level);
        const Band &blur = filters.blur[level].forward;
        const auto columns = [&](int y) {
            const Line line = line_of(blur, y);
            Lanes *kept = buffer + kept_row(y, size);
            return [=](int x) { kept[x] = product(line, pictures + map + x, size); };
        };
        for_rows(team, size, size, columns, size, [&](int y) {
            const Lanes *kept = buffer + kept_row(y, size);
            const int64_t start = map + int64_t{y} * size;
            return [=, &blur](int x) {
                levels[start + x] = pictures[start + x] - product(line_of(blur, x), kept, 1);
            };
        });
        filter(team, filters.reduce[level].forward, pictures + map, buffer,
               pictures + start_of(call, level + 1));
    }
}

// From the coarsest level to the finest: the gradient by the picture, in its place.
template <class Lanes>
MIEN_HD void put_together(const FilteredCall &call, const Team &team, Lanes *pictures,
                          const Lanes *levels, Lanes *buffer, Lanes *below) {
    const LaplacianFilters filters = laplacian_filters(call);
    for (int level = kLaplacianSteps - 1; level >= 0; --level) {
        const int size = call.sizes[level], next_size = call.sizes[level + 1];
        const int64_t map = start_of(call, level);
        const Band &blur = filters.blur[level].transposed;
        const Band &reduce = filters.reduce[level].transposed;
        const Lanes *next = pictures + start_of(call, level + 1);
        const auto columns = [&](int y) {
            const Line of_blur = line_of(blur, y), of_reduce = line_of(reduce, y);
            Lanes *blurred = buffer + kept_row(y, size), *spread = below + kept_row(y, next_size);
            return [=](int x) {
                blurred[x] = product(of_blur, levels + map + x, size);
                if (x < next_size) spread[x] = product(of_reduce, next + x, next_size);
            };
        };
        for_rows(team, size, size, columns, size, [&](int y) {
            const Lanes *blurred = buffer + kept_row(y, size);
            const Lanes *spread = below + kept_row(y, next_size);
            const int64_t start = map + int64_t{y} * size;
            return [=, &blur, &reduce](int x) {
                pictures[start + x] = levels[start + x] - product(line_of(blur, x), blurred, 1) +
                                      product(line_of(reduce, x), spread, 1);
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
    Lanes *less = weight + area, *value = less + area, *buffer = value + area;
    Lanes *below = buffer + area, *totals = below + area;
    for_pixels(team, size, size, [&](int y) {
        return [=](int x) {
            const int64_t at = int64_t{y} * size + x;
            pictures[at] = load(planes.pred, at) - load(planes.target, at);
            weight[at] = load(planes.weight, at);
        };
    });
    take_apart(call, team, pictures, levels, buffer);
    float share = 1.0f;
    for (int level = 0; level <= kLaplacianSteps; ++level, share *= 0.25f) {
        const int level_size = call.sizes[level];
        // To weigh an enlarged level is to weigh the level with what the transpose makes of
        // weights.
        const Lanes *weights = level == 0 ? weight : less;
        if (level > 0)
            filter(team, laplacian_filters(call).enlarge[level - 1].transposed, weight, buffer,
                   less);
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
    put_together(call, team, pictures, levels, buffer, below);
    store_gradient(call, team, planes, pictures);
    store_value(call, team, planes, totals);
}

}  // namespace mien
