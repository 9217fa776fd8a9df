// What the losses by filters are made of: teams, planes, and filters along an axis.
//
// A plane is one channel of one face. A team works on a plane from its pixels to its gradient: on a
// GPU a block, with a barrier behind each stage; on a CPU one thread, on eight planes at once where
// it has lanes for them. So all of a plane's numbers lie next to each other in `Lanes`, filters run
// along both axes alike, and a border is nothing but other numbers in a row of a matrix.
#pragma once

#include "filtered_loss.h"
#include "lanes.cuh"

namespace mien {

constexpr int kTeamThreads = 1024;  // of a block; chosen on the CPU, unmeasured on a GPU

struct Team {
    int thread, threads;
};

// ---- stages -----------------------------------------------------------------------------------

MIEN_HD void end_stage() {
#if defined(__CUDA_ARCH__)
    __syncthreads();
#endif
}

// Calls rows(y)(x) for every pixel: what rows(y) holds of a row is made once a row on a CPU.
template <class Rows>
MIEN_HD void for_pixels(const Team &team, int height, int width, const Rows &rows) {
#if defined(__CUDA_ARCH__)
    for (int i = team.thread; i < height * width; i += team.threads) rows(i / width)(i % width);
#else
    (void)team;
    for (int y = 0; y < height; ++y) {
        const auto row = rows(y);
        for (int x = 0; x < width; ++x) row(x);
    }
#endif
    end_stage();
}

// Calls columns(y)(x) for every x below `length`, then rows(y)(x) for every pixel of that row. What
// rows take of columns lies in a buffer: of a row on a CPU, where it stays in the cache, else of
// all.
template <class Columns, class Rows>
MIEN_HD void for_rows(const Team &team, int height, int length, const Columns &columns, int width,
                      const Rows &rows) {
#if defined(__CUDA_ARCH__)
    for_pixels(team, height, length, columns);
    for_pixels(team, height, width, rows);
#else
    (void)team;
    for (int y = 0; y < height; ++y) {
        const auto column = columns(y);
        for (int x = 0; x < length; ++x) column(x);
        const auto row = rows(y);
        for (int x = 0; x < width; ++x) row(x);
    }
#endif
}

// Where a row begins in such a buffer.
MIEN_HD int64_t kept_row(int y, int length) {
#if defined(__CUDA_ARCH__)
    return int64_t{y} * length;
#else
    (void)y, (void)length;
    return 0;
#endif
}

// ---- planes -----------------------------------------------------------------------------------

// A pointer for each lane; no array where there is one, so that it stays in a register.
template <class Lanes, class Number>
struct Pointers {
    Number *of[kWidth<Lanes>];
};
template <class Number>
struct Pointers<float, Number> {
    Number *of;
};

template <class Lanes, class Number>
MIEN_HD void point_to(Pointers<Lanes, Number> &pointers, int lane, Number *to) {
    if constexpr (kWidth<Lanes> == 1)
        pointers.of = to;
    else
        pointers.of[lane] = to;
}

template <class Lanes>
MIEN_HD Lanes load(const Pointers<Lanes, const float> &from, int64_t at) {
    if constexpr (kWidth<Lanes> == 1) {
        return from.of[at];
    } else {
        Lanes lanes;
        for (int lane = 0; lane < kWidth<Lanes>; ++lane) lanes[lane] = from.of[lane][at];
        return lanes;
    }
}

template <class Lanes>
MIEN_HD void store(const Pointers<Lanes, float> &to, int count, int64_t at, Lanes lanes) {
    if constexpr (kWidth<Lanes> == 1)
        to.of[at] = lanes;
    else
        for (int lane = 0; lane < count; ++lane) to.of[lane][at] = lanes[lane];
}

// The planes that a team works on, one a lane; behind the last one it stands again, unstored.
template <class Lanes>
struct Planes {
    Pointers<Lanes, const float> pred, target, weight;
    Pointers<Lanes, float> gradient, value;
    int count;
};

template <class Lanes>
MIEN_HD Planes<Lanes> planes_at(const FilteredCall &call, int64_t first_plane) {
    const int64_t area = int64_t{call.size} * call.size, left = call.num_planes - first_plane;
    Planes<Lanes> planes;
    planes.count = left < kWidth<Lanes> ? static_cast<int>(left) : kWidth<Lanes>;
    for (int lane = 0; lane < kWidth<Lanes>; ++lane) {
        const int64_t plane = first_plane + (lane < planes.count ? lane : planes.count - 1);
        point_to(planes.pred, lane, call.pred + plane * area);
        point_to(planes.target, lane, call.target + plane * area);
        point_to(planes.weight, lane, call.weight + plane / call.channels * area);
        point_to(planes.gradient, lane, call.gradient + plane * area);
        point_to(planes.value, lane, call.values + plane);
    }
    return planes;
}

// ---- filters ----------------------------------------------------------------------------------

// A row of a filter's matrix.
struct Line {
    const float *taps;
    int first, count;
};

MIEN_HD Line line_of(const Band &band, int i) {
    return {band.taps + int64_t{i} * band.num_taps,
            clamp_int(band.first[i], 0, band.from_size - band.num_taps), band.num_taps};
}

// The product of a line with numbers that are `step` apart: a row's are 1, a column's its width.
template <class Lanes>
MIEN_HD Lanes product(const Line &line, const Lanes *from, int step) {
    from += int64_t{line.first} * step;
    Lanes sum = *from * line.taps[0];
    for (int k = 1; k < line.count; ++k) {
        from += step;
        sum = fused(*from, line.taps[k], sum);
    }
    return sum;
}

// Along both axes; `buffer` has room for band.size rows of band.from_size numbers.
template <class Lanes>
MIEN_HD void filter(const Team &team, const Band &band, const Lanes *from, Lanes *buffer,
                    Lanes *to) {
    const int length = band.from_size;
    const auto columns = [&](int y) {
        const Line line = line_of(band, y);
        Lanes *kept = buffer + kept_row(y, length);
        return [=](int x) { kept[x] = product(line, from + x, length); };
    };
    for_rows(team, band.size, length, columns, band.size, [&](int y) {
        const Lanes *kept = buffer + kept_row(y, length);
        Lanes *row = to + int64_t{y} * band.size;
        return [=, &band](int x) { row[x] = product(line_of(band, x), kept, 1); };
    });
}

// ---- pyramids --------------------------------------------------------------------------------

MIEN_HD int64_t area_of(const FilteredCall &call, int level) {
    return int64_t{call.sizes[level]} * call.sizes[level];
}

// Numbers in the levels before this one: where its map begins in a pyramid of maps.
MIEN_HD int64_t start_of(const FilteredCall &call, int level) {
    int64_t start = 0;
    for (int before = 0; before < level; ++before) start += area_of(call, before);
    return start;
}

// ---- results ----------------------------------------------------------------------------------

// Adds a map to `totals`, one a column of the picture; `begins` sets them.
template <class Lanes>
MIEN_HD void add_up(const Team &team, const Lanes *map, int size, bool begins, Lanes *totals) {
    for (int x = team.thread; x < size; x += team.threads) {
        Lanes total = begins ? Lanes{} : totals[x];
        for (int y = 0; y < size; ++y) total += map[int64_t{y} * size + x];
        totals[x] = total;
    }
    end_stage();
}

template <class Lanes>
MIEN_HD void store_value(const FilteredCall &call, const Team &team, const Planes<Lanes> &planes,
                         const Lanes *totals) {
    if (team.thread == 0) {
        Lanes total = totals[0];
        for (int x = 1; x < call.size; ++x) total += totals[x];
        const float area = static_cast<float>(call.size) * static_cast<float>(call.size);
        store(planes.value, planes.count, 0, total / area);
    }
    end_stage();
}

// Share of one number of the map in the mean over pixels and channels.
MIEN_HD float share_of(const FilteredCall &call) {
    return 1.0f / (static_cast<float>(call.size) * static_cast<float>(call.size) *
                   static_cast<float>(call.channels));
}

template <class Lanes>
MIEN_HD void store_gradient(const FilteredCall &call, const Team &team, const Planes<Lanes> &planes,
                            const Lanes *gradient) {
    const int size = call.size;
    const float share = share_of(call);
    for_pixels(team, size, size, [&](int y) {
        return [=](int x) {
            const int64_t at = int64_t{y} * size + x;
            store(planes.gradient, planes.count, at, gradient[at] * share);
        };
    });
}

}  // namespace mien
