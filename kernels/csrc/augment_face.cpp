// One face on one thread. Compiled once per instruction set (MIEN_AUGMENT_FACE names the copy), so
// nothing here may have external linkage but that one function: no std::, no shared inlines.
#include "augment_face.h"

#include <string.h>

#include "augment.cuh"
#include "draw.cuh"

namespace {

using mien::FaceCall;

constexpr int kBorder = 2;  // zeros round the picture that the warp reads

// Scratch of one thread, carved from one block.
struct Scratch {
    uint64_t *colored;       // [S, S]
    uint64_t *bordered;      // [S + 4, S + 4]
    uint64_t *picture;       // its pixel (0, 0)
    uint64_t *warped;        // [S, S]
    uint64_t *small;         // [largest output or input below S]^2
    uint8_t *lab[3];         // [S, S]
    uint8_t *tile_levels;    // [tiles, tiles, 256]
    mien::ClaheSpan *spans;  // [S]
    int *columns[2];         // [S]
    int *taps[4];            // [S]
    int *parts[2];           // [S]
    float *grid[2];          // [5, S]
    float *places[2];        // [S]
    mien::AreaSpan *areas;   // [S]
    float *sums;             // [S, 8]
    float *line;             // [S, 8]
    int stride;              // of bordered
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
    s.colored = carver.take<uint64_t>(area);
    s.bordered = carver.take<uint64_t>(static_cast<size_t>(s.stride) * s.stride);
    s.picture = s.bordered + kBorder * s.stride + kBorder;
    s.warped = carver.take<uint64_t>(area);
    s.small = carver.take<uint64_t>(area);
    for (auto &plane : s.lab) plane = carver.take<uint8_t>(area);
    s.tile_levels = carver.take<uint8_t>(tiles * tiles * 256);
    s.spans = carver.take<mien::ClaheSpan>(edge);
    for (auto &array : s.columns) array = carver.take<int>(edge);
    for (auto &array : s.taps) array = carver.take<int>(edge);
    for (auto &array : s.parts) array = carver.take<int>(edge);
    for (auto &array : s.grid) array = carver.take<float>(5 * edge);
    for (auto &array : s.places) array = carver.take<float>(edge);
    s.areas = carver.take<mien::AreaSpan>(edge);
    s.sums = carver.take<float>(8 * edge);
    s.line = carver.take<float>(8 * edge);
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

void equalise(uint8_t *light, int size, int num_tiles, const Scratch &s) {
    const mien::ClaheTiles tiles = mien::clahe_of(num_tiles, size);
    clahe_tables(light, size, tiles, s.tile_levels);
    for (int at = 0; at < size; ++at) s.spans[at] = mien::clahe_span(tiles, at);
    for (int y = 0; y < size; ++y) {
        const mien::ClaheSpan row = s.spans[y];
        const uint8_t *upper = s.tile_levels + row.first * tiles.count * 256;
        const uint8_t *lower = s.tile_levels + row.second * tiles.count * 256;
        uint8_t *line = light + y * size;
        for (int x = 0; x < size; ++x) {
            const mien::ClaheSpan column = s.spans[x];
            const int near = column.first * 256 + line[x], far = column.second * 256 + line[x];
            line[x] = static_cast<uint8_t>(
                mien::clahe_blend(column, row, upper[near], upper[far], lower[near], lower[far]));
        }
    }
}

void vary_color(const FaceCall &call, const mien_face &face, const uint64_t *source,
                const Scratch &s) {
    const int size = call.job->size_px, area = size * size;
    const mien::ColorTables &tables = *call.colors;
    uint8_t moved[3][256];
    for (int channel = 0; channel < 3; ++channel)
        for (int level = 0; level < 256; ++level)
            moved[channel][level] = static_cast<uint8_t>(mien::shifted(level, face.lab[channel]));
    for (int i = 0; i < area; ++i) {
        const mien::Lab lab = mien::lab_of(tables, static_cast<uint32_t>(source[i]));
        s.lab[0][i] = moved[0][lab.l];
        s.lab[1][i] = moved[1][lab.a];
        s.lab[2][i] = moved[2][lab.b];
    }
    if (face.clahe_tiles > 0) equalise(s.lab[0], size, face.clahe_tiles, s);
    for (int i = 0; i < area; ++i) {
        const mien::Lab lab{s.lab[0][i], s.lab[1][i], s.lab[2][i]};
        s.colored[i] = (source[i] & 0x0000FFFFFF000000u) | mien::bgr_of(tables, lab);
    }
}

// ---- affine and flip --------------------------------------------------------------------------

void transform(const mien_face &face, const uint64_t *source, int size, const Scratch &s) {
    const mien::Inverse inverse = mien::inverse_of(face.matrix);
    for (int x = 0; x < size; ++x) {
        const mien::Steps steps = mien::column_steps(inverse, face.flip ? size - 1 - x : x);
        s.columns[0][x] = steps.x;
        s.columns[1][x] = steps.y;
    }
    for (int y = 0; y < size; ++y) {
        const mien::Steps row = mien::row_steps(inverse, y);
        for (int x = 0; x < size; ++x) {
            const int at_x = (row.x + s.columns[0][x]) >> 5, at_y = (row.y + s.columns[1][x]) >> 5;
            const int left = mien::clamp_int(at_x >> 5, 0, size - 1);
            const int right = mien::clamp_int((at_x >> 5) + 1, 0, size - 1);
            const int top = mien::clamp_int(at_y >> 5, 0, size - 1) * size;
            const int bottom = mien::clamp_int((at_y >> 5) + 1, 0, size - 1) * size;
            s.taps[0][x] = top + left;
            s.taps[1][x] = top + right;
            s.taps[2][x] = bottom + left;
            s.taps[3][x] = bottom + right;
            s.parts[0][x] = at_x & 31;
            s.parts[1][x] = at_y & 31;
        }
        uint64_t *out = s.picture + y * s.stride;
        for (int x = 0; x < size; ++x)
            out[x] =
                mien::blend_pixels(source[s.taps[0][x]], source[s.taps[1][x]], source[s.taps[2][x]],
                                   source[s.taps[3][x]], s.parts[0][x], s.parts[1][x]);
    }
}

void clear_border(int size, const Scratch &s) {
    const size_t band = static_cast<size_t>(kBorder) * s.stride * sizeof(uint64_t);
    memset(s.bordered, 0, band);
    memset(s.bordered + (size + kBorder) * s.stride, 0, band);
    for (int y = 0; y < size; ++y) {
        uint64_t *row = s.picture + y * s.stride;
        for (int x = 0; x < kBorder; ++x) row[x - kBorder] = row[size + x] = 0;
    }
}

// ---- random warp ------------------------------------------------------------------------------

void warp(const mien_face &face, int size, const Scratch &s) {
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
    for (int y = 0; y < size; ++y) {
        const mien::GridSpan span = mien::grid_span(y, size);
        const int upper = span.first * size, lower = (span.first < 4 ? span.first + 1 : 4) * size;
        for (int x = 0; x < size; ++x) {
            const mien::Place column = mien::place_of(
                mien::mix(s.grid[0][upper + x], s.grid[0][lower + x], span.part), size);
            const mien::Place row = mien::place_of(
                mien::mix(s.grid[1][upper + x], s.grid[1][lower + x], span.part), size);
            s.taps[0][x] = row.first * s.stride + column.first;
            s.places[0][x] = column.part;
            s.places[1][x] = row.part;
        }
        uint64_t *out = s.warped + y * size;
        for (int x = 0; x < size; ++x) {
            const uint64_t *top = s.picture + s.taps[0][x], *bottom = top + s.stride;
            out[x] = mien::mix_pixels(top[0], top[1], bottom[0], bottom[1], s.places[0][x],
                                      s.places[1][x]);
        }
    }
}

// ---- area resize ------------------------------------------------------------------------------

void box_resize(const uint64_t *from, int stride, int ratio, int to_px, uint64_t *to) {
    const float per_pixel = 1.0f / static_cast<float>(ratio * ratio);
    for (int y = 0; y < to_px; ++y) {
        for (int x = 0; x < to_px; ++x) {
            int sums[8] = {};
            for (int row = 0; row < ratio; ++row) {
                const uint64_t *box = from + (y * ratio + row) * stride + x * ratio;
                for (int column = 0; column < ratio; ++column)
                    for (int c = 0; c < 8; ++c)
                        sums[c] += static_cast<int>(box[column] >> 8 * c) & 255;
            }
            uint64_t pixel = 0;
            for (int c = 0; c < 6; ++c)
                pixel |= static_cast<uint64_t>(mien::box_mean(sums[c], ratio, per_pixel)) << 8 * c;
            to[y * to_px + x] = pixel;
        }
    }
}

void area_resize(const uint64_t *from, int stride, int from_px, int to_px, uint64_t *to,
                 const Scratch &s) {
    if (from_px % to_px == 0) return box_resize(from, stride, from_px / to_px, to_px, to);
    for (int at = 0; at < to_px; ++at) s.areas[at] = mien::area_span(at, from_px, to_px);
    int held = -1;  // the source row that s.line holds
    for (int y = 0; y < to_px; ++y) {
        const mien::AreaSpan rows = s.areas[y];
        for (int at = 0; at < rows.count; ++at) {
            const int source_row = rows.begin + at;
            if (source_row != held) {
                const uint64_t *row = from + source_row * stride;
                for (int x = 0; x < to_px; ++x) {
                    const mien::AreaSpan columns = s.areas[x];
                    float total[8] = {};
                    for (int i = 0; i < columns.count; ++i) {
                        const float weight = mien::area_weight(columns, i);
                        const uint64_t pixel = row[columns.begin + i];
                        for (int c = 0; c < 8; ++c)
                            total[c] +=
                                static_cast<float>(static_cast<int>(pixel >> 8 * c) & 255) * weight;
                    }
                    memcpy(s.line + 8 * x, total, sizeof total);
                }
                held = source_row;
            }
            const float weight = mien::area_weight(rows, at);
            if (at == 0)
                for (int i = 0; i < 8 * to_px; ++i) s.sums[i] = s.line[i] * weight;
            else
                for (int i = 0; i < 8 * to_px; ++i) s.sums[i] += s.line[i] * weight;
        }
        for (int x = 0; x < to_px; ++x) {
            uint64_t pixel = 0;
            for (int c = 0; c < 6; ++c)
                pixel |= static_cast<uint64_t>(
                             mien::clamp_int(mien::round_int(s.sums[8 * x + c]), 0, 255))
                         << 8 * c;
            to[y * to_px + x] = pixel;
        }
    }
}

// ---- stores -----------------------------------------------------------------------------------

template <typename T>
void store_levels(const uint64_t *row, int count, int rgb, const T levels[256], T *out) {
    const int first = rgb ? 16 : 0, last = rgb ? 0 : 16;
    for (int x = 0; x < count; ++x) {
        const uint32_t pixel = static_cast<uint32_t>(row[x]);
        out[3 * x] = levels[(pixel >> first) & 255];
        out[3 * x + 1] = levels[(pixel >> 8) & 255];
        out[3 * x + 2] = levels[(pixel >> last) & 255];
    }
}

void store_picture(const FaceCall &call, int type, const uint64_t *picture, int stride, int edge,
                   int64_t face, void *out) {
    const int64_t start = face * edge * edge * 3;
    for (int y = 0; y < edge; ++y) {
        const uint64_t *row = picture + y * stride;
        const int64_t at = start + static_cast<int64_t>(y) * edge * 3;
        if (type == MIEN_FLOAT32)
            store_levels(row, edge, call.job->rgb, call.levels->float32,
                         static_cast<uint32_t *>(out) + at);
        else
            store_levels(row, edge, call.job->rgb,
                         type == MIEN_BFLOAT16 ? call.levels->bfloat16 : call.levels->float16,
                         static_cast<uint16_t *>(out) + at);
    }
}

void store_weights(const mien_augment_job &job, const uint64_t *picture, int stride, int edge,
                   float *out) {
    for (int y = 0; y < edge; ++y) {
        const uint64_t *row = picture + y * stride;
        float *line = out + y * edge;
        if (!job.penalize) {
            for (int x = 0; x < edge; ++x) line[x] = 1.0f;
            continue;
        }
        for (int x = 0; x < edge; ++x)
            line[x] = mien::pixel_weight(job, static_cast<int>(row[x] >> 24) & 255,
                                         static_cast<int>(row[x] >> 32) & 255,
                                         static_cast<int>(row[x] >> 40) & 255);
    }
}

void store_mask(const uint64_t *picture, int stride, int edge, float *out) {
    for (int y = 0; y < edge; ++y)
        for (int x = 0; x < edge; ++x)
            out[y * edge + x] =
                mien::unit_level(static_cast<int>(picture[y * stride + x] >> 24) & 255);
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
    const int64_t area = int64_t{size} * size;
    const Scratch s = carve(size, scratch, nullptr);

    const uint64_t *source = reinterpret_cast<const uint64_t *>(job.faces) + face.index * area;
    if (face.color) {
        vary_color(call, face, source, s);
        source = s.colored;
    }
    transform(face, source, size, s);

    for (int i = 0; i < job.num_outputs; ++i) {
        const int edge = job.output_px[i];
        const uint64_t *picture = s.picture;
        int stride = s.stride;
        if (edge != size) {
            area_resize(s.picture, s.stride, size, edge, s.small, s);
            picture = s.small;
            stride = edge;
        }
        store_picture(call, job.target_type, picture, stride, edge, n, job.targets[i]);
        const int64_t at = n * edge * edge;
        store_weights(job, picture, stride, edge, job.weights[i] + at);
        if (job.mask && i == job.num_outputs - 1) store_mask(picture, stride, edge, job.mask + at);
    }

    const uint64_t *input = s.picture;
    int stride = s.stride;
    if (face.warp) {
        clear_border(size, s);
        warp(face, size, s);
        input = s.warped;
        stride = size;
    }
    if (job.input_px != size) {
        area_resize(input, stride, size, job.input_px, s.small, s);
        input = s.small;
        stride = job.input_px;
    }
    store_picture(call, job.input_type, input, stride, job.input_px, n, job.input);
}

}  // namespace mien
