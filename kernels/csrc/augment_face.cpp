// One face on one thread. Compiled once per instruction set (MIEN_AUGMENT_FACE names the copy), so
// nothing here may have external linkage but that one function: no std::, no shared inlines.
#include "augment_face.h"

#include <string.h>

#include "augment.cuh"
#include "augment_avx2.h"
#include "augment_landmarks.cuh"
#include "draw.cuh"

namespace {

using mien::FaceCall;

constexpr int kBorder = 2;  // zeros round the picture that the warp reads

// Pixels of a row: from begin on, end excluded.
struct Run {
    int begin, end;
};

// Scratch of one thread, carved from one block.
struct Scratch {
    uint32_t *colored;       // [S, S] B G R face, with its colour varied
    uint32_t *bordered;      // [S + 4, S + 4] B G R face, turned and mirrored
    uint32_t *picture;       // its pixel (0, 0)
    uint32_t *areas;         // [S, S] eye mouth, turned and mirrored
    uint32_t *warped;        // [S, S]
    uint32_t *small[2];      // [S, S] picture and areas, resized
    uint8_t *lab[3];         // [S, S]
    uint8_t *tile_levels;    // [tiles, tiles, 256]
    mien::ClaheSpan *tiles;  // [S]
    float *tile_parts;       // [S] part of each of them
    int *columns[2];         // [S] x and y of each column's steps
    uint32_t *area_columns;  // [S] all areas of each column of the store
    Run *area_runs[2];       // [S] pixels of each row that may have an area; the same, resized
    float *grid[2];          // [5, S]
    float *place[2];         // [S] x and y that a row of the warp comes from
    mien::AreaSpan *spans;   // [S]
    mien::Mesh *mesh;        // of the warp to landmarks
    mien::Patch *patches;
    float *map[2];  // [S, S] x and y that the pixels come from
    int stride;     // of bordered
};

struct Carver {
    unsigned char *at;

    template <typename T>
    T *take(size_t count) {
        T *start = reinterpret_cast<T *>(at);
        at += (count * sizeof(T) + 63) / 64 * 64;
        return start;
    }
};

Scratch carve(int size, unsigned char *block, size_t *bytes) {
    Carver carver{block};
    Scratch s;
    const size_t edge = static_cast<size_t>(size), area = edge * edge;
    const size_t tiles = static_cast<size_t>(mien::clahe_tiles(size, 8));
    s.stride = size + 2 * kBorder;
    s.colored = carver.take<uint32_t>(area);
    s.bordered = carver.take<uint32_t>(static_cast<size_t>(s.stride) * s.stride);
    s.picture = s.bordered + kBorder * s.stride + kBorder;
    s.areas = carver.take<uint32_t>(area);
    s.warped = carver.take<uint32_t>(area);
    for (auto &plane : s.small) plane = carver.take<uint32_t>(area);
    for (auto &plane : s.lab) plane = carver.take<uint8_t>(area);
    s.tile_levels = carver.take<uint8_t>(tiles * tiles * 256);
    s.tiles = carver.take<mien::ClaheSpan>(edge);
    s.tile_parts = carver.take<float>(edge);
    for (auto &line : s.columns) line = carver.take<int>(edge);
    s.area_columns = carver.take<uint32_t>(edge);
    for (auto &runs : s.area_runs) runs = carver.take<Run>(edge);
    for (auto &lines : s.grid) lines = carver.take<float>(5 * edge);
    for (auto &line : s.place) line = carver.take<float>(edge);
    s.spans = carver.take<mien::AreaSpan>(edge);
    s.mesh = carver.take<mien::Mesh>(1);
    s.patches = carver.take<mien::Patch>(mien::kMaxTriangles);
    for (auto &plane : s.map) plane = carver.take<float>(area);
    if (bytes) *bytes = static_cast<size_t>(carver.at - block);
    return s;
}

// ---- colour -----------------------------------------------------------------------------------

void clahe_tables(const uint8_t *light, int size, const mien::ClaheTiles &tiles, uint8_t *levels) {
    for (int tile_y = 0; tile_y < tiles.count; ++tile_y) {
        for (int tile_x = 0; tile_x < tiles.count; ++tile_x) {
            int bins[2][256] = {};
            for (int y = 0; y < tiles.edge_px; ++y) {
                const uint8_t *row =
                    light + mien::reflected(tile_y * tiles.edge_px + y, size) * size;
                const int begin = tile_x * tiles.edge_px, end = begin + tiles.edge_px;
                const int inside = end < size ? end : size;
                int x = begin;
                for (; x + 1 < inside; x += 2) {
                    ++bins[0][row[x]];
                    ++bins[1][row[x + 1]];
                }
                for (; x < end; ++x) ++bins[0][row[mien::reflected(x, size)]];
            }
            int excess = 0;
            for (int bin = 0; bin < 256; ++bin) {
                const int count = bins[0][bin] + bins[1][bin];
                bins[0][bin] = count < tiles.clip ? count : tiles.clip;
                excess += count - bins[0][bin];
            }
            int total = 0;
            for (int bin = 0; bin < 256; ++bin) {
                total += bins[0][bin] + mien::clahe_share(bin, excess);
                levels[bin] = static_cast<uint8_t>(mien::clahe_level(tiles, total));
            }
            levels += 256;
        }
    }
}

// From `at` on, how far the pixels lie between the same two tiles.
int end_of_span(const mien::ClaheSpan *tiles, int at, int size) {
    int end = at + 1;
    while (end < size && tiles[end].first == tiles[at].first &&
           tiles[end].second == tiles[at].second)
        ++end;
    return end;
}

// The levels of four tiles, a word for each level before: near and far of the upper two tiles, then
// of the lower two.
void join_levels(const uint8_t *upper, const uint8_t *lower, const mien::ClaheSpan &column,
                 uint32_t *__restrict joined) {
    const int near = column.first * 256, far = column.second * 256;
    for (int level = 0; level < 256; ++level)
        joined[level] = upper[near + level] | (uint32_t{upper[far + level]} << 8) |
                        (uint32_t{lower[near + level]} << 16) |
                        (uint32_t{lower[far + level]} << 24);
}

void equalise_row(const uint32_t *__restrict joined, const float *__restrict parts,
                  const mien::ClaheSpan &row, int count, uint8_t *__restrict line) {
    for (int x = 0; x < count; ++x) {
        const uint32_t word = joined[line[x]];
        line[x] = static_cast<uint8_t>(mien::clahe_blend(
            mien::ClaheSpan{0, 0, parts[x]}, row, mien::level_of(word, 0), mien::level_of(word, 1),
            mien::level_of(word, 2), mien::level_of(word, 3)));
    }
}

void equalise(uint8_t *light, int size, int num_tiles, const Scratch &s) {
    const mien::ClaheTiles tiles = mien::clahe_of(num_tiles, size);
    clahe_tables(light, size, tiles, s.tile_levels);
    for (int at = 0; at < size; ++at) {
        s.tiles[at] = mien::clahe_span(tiles, at);
        s.tile_parts[at] = s.tiles[at].part;
    }
    for (int top = 0, bottom; top < size; top = bottom) {
        bottom = end_of_span(s.tiles, top, size);
        const uint8_t *upper = s.tile_levels + s.tiles[top].first * tiles.count * 256;
        const uint8_t *lower = s.tile_levels + s.tiles[top].second * tiles.count * 256;
        for (int left = 0, right; left < size; left = right) {
            right = end_of_span(s.tiles, left, size);
            uint32_t joined[256];
            join_levels(upper, lower, s.tiles[left], joined);
            for (int y = top; y < bottom; ++y)
                equalise_row(joined, s.tile_parts + left, s.tiles[y], right - left,
                             light + y * size + left);
        }
    }
}

void to_lab(const mien::ColorTables &tables, const uint32_t *__restrict source, int count,
            uint8_t *__restrict light, uint8_t *__restrict a, uint8_t *__restrict b) {
    for (int i = 0; i < count; ++i) {
        const mien::Lab lab = mien::lab_of(tables, source[2 * i]);
        light[i] = static_cast<uint8_t>(lab.l);
        a[i] = static_cast<uint8_t>(lab.a);
        b[i] = static_cast<uint8_t>(lab.b);
    }
}

// A loop for each channel, as compilers give up on one with three choices.
void shift_levels(float change, int count, uint8_t *__restrict levels) {
    for (int i = 0; i < count; ++i)
        levels[i] = static_cast<uint8_t>(mien::shifted(levels[i], change));
}

void to_bgr(const mien::ColorTables &tables, const uint32_t *__restrict source, int area,
            const uint8_t *__restrict light, const uint8_t *__restrict a,
            const uint8_t *__restrict b, uint32_t *__restrict out) {
    int i = 0;
#ifdef __AVX2__
    i = mien::bgr_row(source, area, light, a, b, out);
#endif
    for (; i < area; ++i)
        out[i] =
            (source[2 * i] & 0xFF000000u) | mien::bgr_of(tables, mien::Lab{light[i], a[i], b[i]});
}

void vary_color(const FaceCall &call, const mien_face &face, const uint32_t *source,
                const Scratch &s) {
    const int size = call.job->size_px, area = size * size;
    if (!face.color) {
        for (int i = 0; i < area; ++i) s.colored[i] = source[2 * i];
        return;
    }
    for (int at = 0; at < area; at += size) {  // by rows, which stay in the nearest cache
        uint8_t *light = s.lab[0] + at, *a = s.lab[1] + at, *b = s.lab[2] + at;
        int done = 0;
#ifdef __AVX2__
        done = mien::lab_row(*call.lab, source + 2 * at, size, face.lab, light, a, b);
#endif
        const int left = size - done;
        to_lab(*call.colors, source + 2 * (at + done), left, light + done, a + done, b + done);
        for (int channel = 0; channel < 3; ++channel)
            shift_levels(face.lab[channel], left, s.lab[channel] + at + done);
    }
    if (face.clahe_tiles > 0) equalise(s.lab[0], size, face.clahe_tiles, s);
    to_bgr(*call.colors, source, area, s.lab[0], s.lab[1], s.lab[2], s.colored);
}

// ---- affine and flip --------------------------------------------------------------------------

// Pixels begin ... end - 1 of a row of one word of every pixel; `step` words from pixel to pixel of
// the source.
template <int step>
void transform_row(const uint32_t *__restrict source, mien::Steps row,
                   const int *__restrict columns_x, const int *__restrict columns_y, int size,
                   Run run, uint32_t *__restrict out) {
    for (int x = run.begin; x < run.end; ++x) {
        const mien::Taps taps = mien::affine_taps(row, {columns_x[x], columns_y[x]}, size);
        out[x] = mien::blend_words(source[step * taps.top_left], source[step * taps.top_right],
                                   source[step * taps.bottom_left],
                                   source[step * taps.bottom_right], taps.right, taps.down);
    }
}

// The smallest box that holds all areas of the store's pixels; where there are none, one whose
// right end lies left of its left one.
mien::Box area_box(const uint32_t *source, int size, uint32_t *__restrict columns) {
    mien::Box box{size, size, -1, -1};
    memset(columns, 0, size * sizeof(uint32_t));
    for (int y = 0; y < size; ++y) {
        const uint32_t *areas = source + int64_t{2} * y * size + 1;
        uint32_t any = 0;
        for (int x = 0; x < size; ++x) {
            any |= areas[2 * x];
            columns[x] |= areas[2 * x];
        }
        if (!any) continue;
        box.top = y < box.top ? y : box.top;
        box.bottom = y;
    }
    for (int x = 0; x < size; ++x) {
        if (!columns[x]) continue;
        box.left = x < box.left ? x : box.left;
        box.right = x;
    }
    return box;
}

// Whether any tap of the pixels between two, which lie in one row, falls between low and high.
bool reaches(int first, int last, int low, int high, int size) {
    const int nearest = (first < last ? first : last) >> 10;
    const int farthest = ((first < last ? last : first) >> 10) + 1;
    return mien::clamp_int(farthest, 0, size - 1) >= low &&
           mien::clamp_int(nearest, 0, size - 1) <= high;
}

// The pixels of a row of the affine that may come out of the box, by blocks of sixteen.
Run area_run(const mien::Box &box, mien::Steps row, const Scratch &s, int size) {
    constexpr int kBlock = 16;
    Run run{size, 0};
    for (int begin = 0; begin < size; begin += kBlock) {
        const int end = begin + kBlock < size ? begin + kBlock : size;
        const int *x = s.columns[0], *y = s.columns[1];
        if (!reaches(row.x + x[begin], row.x + x[end - 1], box.left, box.right, size) ||
            !reaches(row.y + y[begin], row.y + y[end - 1], box.top, box.bottom, size))
            continue;
        run.begin = begin < run.begin ? begin : run.begin;
        run.end = end;
    }
    return run.begin < run.end ? run : Run{0, 0};
}

void transform(const mien_face &face, const uint32_t *source, bool with_areas, int size,
               const Scratch &s) {
    const mien::Inverse inverse = mien::inverse_of(face.matrix);
    for (int x = 0; x < size; ++x) {
        const mien::Steps steps = mien::column_steps(inverse, face.flip ? size - 1 - x : x);
        s.columns[0][x] = steps.x;
        s.columns[1][x] = steps.y;
    }
    const mien::Box box = with_areas ? area_box(source, size, s.area_columns) : mien::Box{};
    for (int y = 0; y < size; ++y) {
        const mien::Steps row = mien::row_steps(inverse, y);
        uint32_t *picture = s.picture + y * s.stride;
        int done = 0;
#ifdef __AVX2__
        done = mien::blend_row(s.colored, row, s.columns[0], s.columns[1], size, picture);
#endif
        transform_row<1>(s.colored, row, s.columns[0], s.columns[1], size, {done, size}, picture);
        const Run run = s.area_runs[0][y] = with_areas ? area_run(box, row, s, size) : Run{0, 0};
        if (!with_areas) continue;
        uint32_t *areas = s.areas + y * size;
        memset(areas, 0, run.begin * sizeof(uint32_t));
        transform_row<2>(source + 1, row, s.columns[0], s.columns[1], size, run, areas);
        memset(areas + run.end, 0, (size - run.end) * sizeof(uint32_t));
    }
}

void clear_border(int size, const Scratch &s) {
    const size_t band = static_cast<size_t>(kBorder) * s.stride * sizeof(uint32_t);
    memset(s.bordered, 0, band);
    memset(s.bordered + (size + kBorder) * s.stride, 0, band);
    for (int y = 0; y < size; ++y) {
        uint32_t *row = s.picture + y * s.stride;
        for (int x = 0; x < kBorder; ++x) row[x - kBorder] = row[size + x] = 0;
    }
}

// ---- random warp ------------------------------------------------------------------------------

// Where a row comes from; upper and lower are the control rows round it, already stretched over the
// columns.
void place_row(const float *__restrict upper, const float *__restrict lower, float part, int size,
               float *__restrict place) {
    for (int x = 0; x < size; ++x) place[x] = mien::mix(upper[x], lower[x], part);
}

// The places in the turned and mirrored picture -> those in the picture before.
void place_back(const mien::Back &back, int size, float *__restrict place_x,
                float *__restrict place_y) {
    for (int x = 0; x < size; ++x) {
        const float at_x = place_x[x], at_y = place_y[x];
        place_x[x] = mien::back_x(back, at_x, at_y);
        place_y[x] = mien::back_y(back, at_x, at_y);
    }
}

// Pixels x ... end - 1 of a row as far as they belong to the patch; `edges`: left_of of each edge
// at x, `steps`: what it changes by from pixel to pixel.
void map_row(const mien::Patch &patch, int64_t edges[3], const int64_t steps[3], int y, int x,
             int end, float *__restrict map_x, float *__restrict map_y) {
    int64_t first = edges[0], second = edges[1], third = edges[2];
    for (; x < end; ++x) {
        const mien::Position from = mien::mapped(patch, x, y);
        const bool inside = (first | second | third) >= 0;
        map_x[x] = inside ? from.x : map_x[x];
        map_y[x] = inside ? from.y : map_y[x];
        first += steps[0];
        second += steps[1];
        third += steps[2];
    }
}

void map_patch(const mien::Patch &patch, int size, const Scratch &s) {
    const mien::Box box = mien::box_of(patch, size);
    const mien::Point corners[4] = {patch.a, patch.b, patch.c, patch.a};
    int64_t steps[3], edges[3];
    for (int i = 0; i < 3; ++i) steps[i] = (int64_t{corners[i].y} - corners[i + 1].y) * mien::kUnit;
    const int middle = (size + 1) / 2;  // from where on pixels on an edge count as further left
    const int ends[2] = {box.right < middle ? box.right + 1 : middle, box.right + 1};
    const int begins[2] = {box.left, box.left < middle ? middle : box.left};
    for (int y = box.top; y <= box.bottom; ++y) {
        for (int half = 0; half < 2; ++half) {
            if (begins[half] >= ends[half]) continue;
            for (int i = 0; i < 3; ++i)
                edges[i] = mien::left_of(corners[i], corners[i + 1], begins[half], y, size);
            map_row(patch, edges, steps, y, begins[half], ends[half], s.map[0] + y * size,
                    s.map[1] + y * size);
        }
    }
}

// Where each pixel of a face that is warped to landmarks comes from.
void map_landmarks(const mien_augment_job &job, const mien_face &face, int side, const Scratch &s) {
    constexpr int64_t kNumbers = 2 * MIEN_LANDMARKS;
    const int64_t other = job.nearest[side][face.index * MIEN_NEAREST + face.near];
    int count = 0;
    mien::make_patches(face, job.landmarks[side] + face.index * kNumbers,
                       job.landmarks[1 - side] + other * kNumbers, job.size_px, s.mesh, s.patches,
                       &count);
    for (int i = 0; i < count; ++i) map_patch(s.patches[i], job.size_px, s);
}

// One row out of a picture that has a border of zeros.
void sample_bordered(const uint32_t *__restrict picture, int stride,
                     const float *__restrict place_x, const float *__restrict place_y, int size,
                     uint32_t *__restrict out) {
    int x = 0;
#ifdef __AVX2__
    x = mien::sample_row(picture, stride, place_x, place_y, size, out);
#endif
    for (; x < size; ++x) {
        const mien::Place column = mien::place_of(place_x[x], size);
        const mien::Place row = mien::place_of(place_y[x], size);
        const int at = row.first * stride + column.first;
        out[x] = mien::mix_words(picture[at], picture[at + 1], picture[at + stride],
                                 picture[at + stride + 1], column.part, row.part);
    }
}

// One row out of a picture whose edge is repeated.
void sample_repeated(const uint32_t *__restrict picture, int stride,
                     const float *__restrict place_x, const float *__restrict place_y, int size,
                     uint32_t *__restrict out) {
    for (int x = 0; x < size; ++x) {
        const mien::EdgePlace column = mien::edge_place_of(place_x[x], size);
        const mien::EdgePlace row = mien::edge_place_of(place_y[x], size);
        const int upper = row.first * stride, lower = row.second * stride;
        out[x] = mien::mix_words(picture[upper + column.first], picture[upper + column.second],
                                 picture[lower + column.first], picture[lower + column.second],
                                 column.part, row.part);
    }
}

void stretch_grid(const mien_face &face, int size, const Scratch &s) {
    for (int axis = 0; axis < 2; ++axis) {
        for (int line = 0; line < 5; ++line) {
            float points[6];
            for (int i = 0; i < 5; ++i)
                points[i] =
                    mien::grid_point(axis == 0 ? i : line, size, face.warp_noise[axis][line][i]);
            points[5] = points[4];
            for (int x = 0; x < size; ++x) {
                const mien::GridSpan span = mien::grid_span(x, size);
                s.grid[axis][line * size + x] =
                    mien::mix(points[span.first], points[span.first + 1], span.part);
            }
        }
    }
}

// `side`: of the face.
void warp(const mien_augment_job &job, const mien_face &face, int side, const Scratch &s) {
    const int size = job.size_px;
    const bool to_landmarks = face.warp == MIEN_WARP_LANDMARKS;
    const mien::Back back = mien::back_of(face, size);
    if (to_landmarks)
        map_landmarks(job, face, side, s);
    else
        stretch_grid(face, size, s);
    if (!job.single_interpolation) clear_border(size, s);
    for (int y = 0; y < size; ++y) {
        float *place_x = s.place[0], *place_y = s.place[1];
        if (to_landmarks) {
            place_x = s.map[0] + y * size;
            place_y = s.map[1] + y * size;
        } else {
            const mien::GridSpan span = mien::grid_span(y, size);
            const int upper = span.first * size;
            const int lower = (span.first < 4 ? span.first + 1 : 4) * size;
            place_row(s.grid[0] + upper, s.grid[0] + lower, span.part, size, place_x);
            place_row(s.grid[1] + upper, s.grid[1] + lower, span.part, size, place_y);
        }
        uint32_t *out = s.warped + y * size;
        if (job.single_interpolation) {
            place_back(back, size, place_x, place_y);
            sample_repeated(s.colored, size, place_x, place_y, size, out);
        } else if (to_landmarks) {
            sample_repeated(s.picture, s.stride, place_x, place_y, size, out);
        } else {
            sample_bordered(s.picture, s.stride, place_x, place_y, size, out);
        }
    }
}

// ---- area resize ------------------------------------------------------------------------------

template <mien::Midway midway>
void halve_row(const uint32_t *__restrict from, int stride, int to_px, uint32_t *__restrict to) {
    for (int x = 0; x < to_px; ++x) to[x] = mien::box_mean(from + 2 * x, stride, 2, midway);
}

void resize(const uint32_t *from, int stride, int from_px, int to_px, mien::Midway midway,
            uint32_t *to, const Scratch &s) {
    const int ratio = from_px / to_px;
    if (from_px % to_px == 0) {
        for (int y = 0; y < to_px; ++y) {
            const uint32_t *row = from + y * ratio * stride;
            uint32_t *out = to + y * to_px;
            if (ratio == 2 && midway == mien::kUp)
                halve_row<mien::kUp>(row, stride, to_px, out);
            else if (ratio == 2)
                halve_row<mien::kToEven>(row, stride, to_px, out);
            else
                for (int x = 0; x < to_px; ++x)
                    out[x] = mien::box_mean(row + ratio * x, stride, ratio, midway);
        }
        return;
    }
    for (int at = 0; at < to_px; ++at) s.spans[at] = mien::area_span(at, from_px, to_px);
    for (int y = 0; y < to_px; ++y)
        for (int x = 0; x < to_px; ++x)
            to[y * to_px + x] = mien::area_mean(from, stride, s.spans[x], s.spans[y]);
}

// ---- stores -----------------------------------------------------------------------------------

// Pixels of all faces from which on a target is written past the cache: it would be gone from there
// before the loss reads it, and what is written there is read from memory first. Of two sides of 16
// faces of 256 px, 12 of 16 bytes a pixel are a target's: it took 4 % of the time of a batch.
constexpr int64_t kPixelsPastCache = int64_t{1} << 20;

#ifdef __AVX2__
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif

bool streams_to(const mien_augment_job &job, int edge, const void *picture, const void *weights) {
    const auto places = reinterpret_cast<uintptr_t>(picture) | reinterpret_cast<uintptr_t>(weights);
    const bool is_large = job.count * edge * edge >= kPixelsPastCache;
    return kCanStream && is_large && edge % 8 == 0 && places % 32 == 0;
}

template <int channels, typename T>
void store_row(const uint32_t *__restrict row, int count, int rgb, [[maybe_unused]] bool streams,
               const T *__restrict levels, T *__restrict out) {
    const int first = rgb ? 16 : 0, last = rgb ? 0 : 16;
    int x = 0;
#ifdef __AVX2__
    if constexpr (channels == 3 && sizeof(T) == sizeof(float))
        x = mien::store_units(row, count, rgb, streams, reinterpret_cast<float *>(out));
#endif
    for (; x < count; ++x) {
        out[channels * x] = levels[(row[x] >> first) & 255];
        out[channels * x + 1] = levels[(row[x] >> 8) & 255];
        out[channels * x + 2] = levels[(row[x] >> last) & 255];
        for (int c = 3; c < channels; ++c) out[channels * x + c] = 0;
    }
}

template <int channels>
void store_picture(const FaceCall &call, int type, const uint32_t *picture, int stride, int edge,
                   int64_t face, bool streams, void *out) {
    const int rgb = call.job->rgb;
    const mien::LevelTables &levels = *call.levels;
    for (int y = 0; y < edge; ++y) {
        const uint32_t *row = picture + y * stride;
        const int64_t at = (face * edge + y) * edge * channels;
        uint32_t *words = static_cast<uint32_t *>(out) + at;
        uint16_t *halves = static_cast<uint16_t *>(out) + at;
        if (type == MIEN_FLOAT32)
            store_row<channels>(row, edge, rgb, streams, levels.float32, words);
        else if (type == MIEN_BFLOAT16)
            store_row<channels>(row, edge, rgb, false, levels.bfloat16, halves);
        else
            store_row<channels>(row, edge, rgb, false, levels.float16, halves);
    }
}

void store_weight_row(float eye_extra, float mouth_extra, const uint32_t *__restrict picture,
                      const uint32_t *__restrict areas, int count, float *__restrict out) {
    for (int x = 0; x < count; ++x)
        out[x] = mien::pixel_weight(eye_extra, mouth_extra, picture[x], areas[x]);
}

void store_mask_row(const uint32_t *__restrict picture, int count, float *__restrict out) {
    for (int x = 0; x < count; ++x) out[x] = mien::unit_level(mien::level_of(picture[x], 3));
}

// `runs`: the pixels of each row that may have an area. `room`: a row, or null where nothing is to
// be written past the cache.
void store_weights(const mien_augment_job &job, const uint32_t *picture, int stride,
                   const uint32_t *areas, const Run *runs, int edge, float *room, float *out) {
    for (int y = 0; y < edge; ++y) {
        const uint32_t *row = picture + y * stride;
        float *line = room ? room : out + y * edge;
        const Run run = runs[y];
        if (job.penalize) {
            store_mask_row(row, run.begin, line);
            store_weight_row(job.eye_extra, job.mouth_extra, row + run.begin,
                             areas + y * edge + run.begin, run.end - run.begin, line + run.begin);
            store_mask_row(row + run.end, edge - run.end, line + run.end);
        } else {
            for (int x = 0; x < edge; ++x) line[x] = 1.0f;
        }
#ifdef __AVX2__
        if (room) mien::stream_row(line, edge, out + y * edge);
#endif
    }
}

}  // namespace

namespace mien {

#ifdef MIEN_AUGMENT_BASELINE
size_t face_scratch_bytes(const mien_augment_job &job) {
    size_t bytes = 0;
    carve(job.size_px, nullptr, &bytes);
    return bytes;
}
#endif

void MIEN_AUGMENT_FACE(const FaceCall &call, int64_t n, unsigned char *scratch) {
    const mien_augment_job &job = *call.job;
    const mien_face &face = job.params[n];
    const int size = job.size_px;
    const Scratch s = carve(size, scratch, nullptr);
    const bool with_areas = job.penalize && (job.eye_extra > 0 || job.mouth_extra > 0);

    const int side = mien::side_of(job, n);
    const int64_t at = job.gathered ? n - side * (job.count / job.num_sides) : face.index;
    const uint32_t *source =
        reinterpret_cast<const uint32_t *>(job.faces[side]) + at * (int64_t{2} * size * size);
    vary_color(call, face, source, s);
    transform(face, source, with_areas, size, s);

    const mien::Midway midway = with_areas ? mien::kToEven : mien::kUp;
    for (int i = 0; i < job.num_outputs; ++i) {
        const int edge = job.output_px[i];
        const uint32_t *picture = s.picture, *areas = s.areas;
        const Run *runs = s.area_runs[0];
        int stride = s.stride;
        if (edge != size) {
            resize(picture, stride, size, edge, midway, s.small[0], s);
            if (with_areas) resize(areas, size, size, edge, midway, s.small[1], s);
            for (int y = 0; y < edge; ++y) s.area_runs[1][y] = {0, with_areas ? edge : 0};
            picture = s.small[0];
            areas = s.small[1];
            runs = s.area_runs[1];
            stride = edge;
        }
        const bool streams = streams_to(job, edge, job.targets[i], job.weights[i]);
        store_picture<3>(call, job.target_type, picture, stride, edge, n, streams, job.targets[i]);
        const int64_t start = n * edge * edge;
        store_weights(job, picture, stride, areas, runs, edge, streams ? s.place[0] : nullptr,
                      job.weights[i] + start);
        if (job.mask && i == job.num_outputs - 1)
            for (int y = 0; y < edge; ++y)
                store_mask_row(picture + y * stride, edge, job.mask + start + y * edge);
    }

    const uint32_t *input = s.picture;
    int stride = s.stride;
    if (face.warp) {
        warp(job, face, side, s);
        input = s.warped;
        stride = size;
    }
    if (job.input_px != size) {
        resize(input, stride, size, job.input_px, mien::kUp, s.small[0], s);
        input = s.small[0];
        stride = job.input_px;
    }
    if (job.input_channels == 3)
        store_picture<3>(call, job.input_type, input, stride, job.input_px, n, false, job.input);
    else
        store_picture<8>(call, job.input_type, input, stride, job.input_px, n, false, job.input);
#ifdef __AVX2__
    _mm_sfence();  // what was written past the cache, before the caller hears that it is there
#endif
}

}  // namespace mien
