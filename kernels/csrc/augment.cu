// The augmentation on a GPU: five launches a batch for a model whose input and output have the
// store's size, and the same per-pixel functions as on the CPU.
//
//   gather    store -> LAB, shifted (read once: the store may lie in host memory); affine steps and
//             the stretched warp grid of each face
//   tables    CLAHE: tile histograms -> level tables, of the faces that have it
//   color     CLAHE, LAB -> BGR, in place
//   transform affine and flip; target and weight of an output that has the store's size
//   outputs   area resize -> target and weight of the other sizes
//   triangles only where faces may be warped to landmarks: their triangulation
//   map       likewise: where each pixel comes from
//   warp      only for an input that is neither the store's size nor half of it
//   input     random warp and mean of a box, or the resize of what was warped -> input

#include <cuda_runtime.h>

#include "augment.cuh"
#include "augment_checks.h"
#include "augment_landmarks.cuh"
#include "draw.cuh"
#include "status.h"

namespace {

constexpr int kThreads = 256;  // of a block; chosen on the CPU, unmeasured on a GPU

__device__ constexpr mien::ColorTables kColors = mien::make_color_tables();

// What lies in the workspace, in bytes from its start.
struct Layout {
    int64_t staged;       // [count, S, S] pixels: LAB, then BGR, and the masks
    int64_t picture;      // [count, S, S] words: B G R face, turned
    int64_t areas;        // [count, S, S] words: eye mouth, turned
    int64_t warped;       // [count, S, S] words; none where `input` warps by itself
    int64_t levels;       // [count, tiles, tiles, 256] bytes
    int64_t columns;      // [count, S] Steps
    int64_t rows;         // [count, S] Steps
    int64_t grid;         // [count, 2, 5, S] float
    int64_t back;         // [count] Back
    int64_t patches;      // [count, kMaxTriangles] Patch; this and the next two for landmarks only
    int64_t num_patches;  // [count] int
    int64_t map;          // [count, S, S] float2
    int64_t bytes;
    int max_tiles;
};

Layout layout_of(const mien_augment_job &job) {
    const int64_t edge = job.size_px, words = job.count * edge * edge * int64_t{sizeof(uint32_t)};
    Layout l{};
    l.max_tiles = mien::clahe_tiles(job.size_px, mien::kMaxClaheSize);
    int64_t at = 0;
    const auto take = [&at](int64_t bytes) {
        const int64_t start = at;
        at += (bytes + 255) / 256 * 256;
        return start;
    };
    l.staged = take(2 * words);
    l.picture = take(words);
    l.areas = take(words);
    l.warped = take(mien::launches_of(job).warp ? words : 0);
    l.levels = take(job.count * l.max_tiles * l.max_tiles * 256);
    l.columns = take(job.count * edge * int64_t{sizeof(mien::Steps)});
    l.rows = take(job.count * edge * int64_t{sizeof(mien::Steps)});
    l.grid = take(job.count * 10 * edge * int64_t{sizeof(float)});
    l.back = take(job.count * int64_t{sizeof(mien::Back)});
    const int64_t mapped = job.to_landmarks ? job.count : 0;
    l.patches = take(mapped * mien::kMaxTriangles * int64_t{sizeof(mien::Patch)});
    l.num_patches = take(mapped * int64_t{sizeof(int)});
    l.map = take(mapped * edge * edge * int64_t{sizeof(float2)});
    l.bytes = at;
    return l;
}

// Everything a kernel needs; passed by value.
struct Call {
    const uint2 *faces[MIEN_MAX_SIDES];
    int64_t num_faces[MIEN_MAX_SIDES];
    const mien_face *params;
    int64_t begin_b;  // the first row of b's
    bool gathered;
    int size, input_px, rgb;
    uint2 *staged;
    uint32_t *picture, *areas, *warped;
    uint8_t *levels;
    mien::Steps *columns, *rows;
    float *grid;
    mien::Back *back;
    const float *landmarks[MIEN_MAX_SIDES];
    const int32_t *nearest[MIEN_MAX_SIDES];
    mien::Patch *patches;
    int *num_patches;
    float2 *map;
    int max_tiles;
    bool single_interpolation;
    bool with_areas, penalize;
    float eye_extra, mouth_extra;
};

struct Output {
    void *target;
    float *weight, *mask;
    int edge, type;
};

struct Outputs {
    Output of[MIEN_MAX_OUTPUTS];
    int count;
};

struct Input {
    void *pixels;
    int type, channels;
};

__device__ int64_t index_in(int64_t index, int64_t num_faces) {
    return index < 0 ? 0 : index < num_faces ? index : num_faces - 1;
}

// How a face is bent; not at all where that needs landmarks and the job has none, or by a number
// that is no mien_warp.
__device__ int warp_of(const Call &call, const mien_face &face) {
    if (face.warp == MIEN_WARP_LANDMARKS && !call.landmarks[0]) return MIEN_NO_WARP;
    return face.warp < MIEN_NO_WARP || face.warp > MIEN_WARP_LANDMARKS ? MIEN_NO_WARP : face.warp;
}

__device__ int tiles_of(const Call &call, const mien_face &face) {
    return face.color ? mien::clamp_int(face.clahe_tiles, 0, call.max_tiles) : 0;
}

// ---- gather -----------------------------------------------------------------------------------

__device__ void prepare_face(const Call &call, const mien_face &face, int64_t n) {
    const int size = call.size;
    const mien::Inverse inverse = mien::inverse_of(face.matrix);
    for (int at = static_cast<int>(threadIdx.x); at < size; at += kThreads) {
        call.columns[n * size + at] = mien::column_steps(inverse, face.flip ? size - 1 - at : at);
        call.rows[n * size + at] = mien::row_steps(inverse, at);
    }
    const int warp = warp_of(call, face);
    if (warp == MIEN_NO_WARP) return;
    if (threadIdx.x == 0) call.back[n] = mien::back_of(face, size);
    if (warp != MIEN_WARP_GRID) return;
    for (int at = static_cast<int>(threadIdx.x); at < size; at += kThreads) {
        const mien::GridSpan span = mien::grid_span(at, size);
        const int next = span.first < 4 ? span.first + 1 : 4;
        for (int line = 0; line < 10; ++line) {
            const int axis = line / 5, row = line % 5;
            const float *noise = face.warp_noise[axis][row];
            const float first =
                mien::grid_point(axis == 0 ? span.first : row, size, noise[span.first]);
            const float second = mien::grid_point(axis == 0 ? next : row, size, noise[next]);
            call.grid[(n * 10 + line) * size + at] = mien::mix(first, second, span.part);
        }
    }
}

// blockIdx.x: kThreads pixels, or (the last one) the tables of the face; blockIdx.y: the face.
__global__ void __launch_bounds__(kThreads) gather_kernel(const Call call) {
    const int64_t n = blockIdx.y;
    const mien_face &face = call.params[n];
    if (blockIdx.x == gridDim.x - 1) return prepare_face(call, face, n);
    const int area = call.size * call.size;
    const int i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= area) return;
    const bool of_b = n >= call.begin_b;
    const int64_t index = index_in(face.index, of_b ? call.num_faces[1] : call.num_faces[0]);
    const int64_t at = call.gathered ? n - (of_b ? call.begin_b : 0) : index;
    uint2 pixel = __ldg((of_b ? call.faces[1] : call.faces[0]) + at * area + i);
    if (face.color) {
        const mien::Lab lab = mien::lab_of(kColors, pixel.x);
        pixel.x = (pixel.x & 0xFF000000u) |
                  static_cast<uint32_t>(mien::shifted(lab.l, face.lab[0]) |
                                        (mien::shifted(lab.a, face.lab[1]) << 8) |
                                        (mien::shifted(lab.b, face.lab[2]) << 16));
    }
    call.staged[n * area + i] = pixel;
}

// ---- colour -----------------------------------------------------------------------------------

// Inclusive sum over the block of kThreads threads; every thread gets its own.
__device__ int block_scan(int value, int *warp_sums) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, value, step);
        if (lane >= step) value += other;
    }
    __syncthreads();  // warp_sums may still be read from the last call
    if (lane == 31) warp_sums[warp] = value;
    __syncthreads();
    for (int before = 0; before < warp; ++before) value += warp_sums[before];
    return value;
}

// blockIdx.x: a tile, or nothing where the face has fewer; blockIdx.y: the face.
__global__ void __launch_bounds__(kThreads) tables_kernel(const Call call) {
    __shared__ int bins[kThreads];
    __shared__ int warp_sums[kThreads / 32];
    const int64_t n = blockIdx.y;
    const int num_tiles = tiles_of(call, call.params[n]), tile = static_cast<int>(blockIdx.x);
    if (tile >= num_tiles * num_tiles) return;
    const int size = call.size, thread = static_cast<int>(threadIdx.x);
    const mien::ClaheTiles tiles = mien::clahe_of(num_tiles, size);
    const int left = tile % num_tiles * tiles.edge_px, top = tile / num_tiles * tiles.edge_px;
    const uint2 *staged = call.staged + n * size * size;
    bins[thread] = 0;
    __syncthreads();
    for (int i = thread; i < tiles.area; i += kThreads) {
        const int x = mien::reflected(left + i % tiles.edge_px, size);
        const int y = mien::reflected(top + i / tiles.edge_px, size);
        atomicAdd(bins + (staged[y * size + x].x & 255), 1);  // whole numbers: one sum
    }
    __syncthreads();
    const int count = bins[thread], clipped = count < tiles.clip ? count : tiles.clip;
    __syncthreads();
    bins[thread] = block_scan(count - clipped, warp_sums);
    __syncthreads();
    const int excess = bins[kThreads - 1];
    const int total = block_scan(clipped + mien::clahe_share(thread, excess), warp_sums);
    const int64_t table = n * call.max_tiles * call.max_tiles + tile;
    call.levels[table * 256 + thread] = static_cast<uint8_t>(mien::clahe_level(tiles, total));
}

__global__ void __launch_bounds__(kThreads) color_kernel(const Call call) {
    const int64_t n = blockIdx.y;
    const int size = call.size, i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
    const mien_face &face = call.params[n];
    if (i >= size * size || !face.color) return;
    uint32_t &word = call.staged[n * size * size + i].x;
    mien::Lab lab{mien::level_of(word, 0), mien::level_of(word, 1), mien::level_of(word, 2)};
    const int num_tiles = tiles_of(call, face);
    if (num_tiles > 0) {
        const mien::ClaheTiles tiles = mien::clahe_of(num_tiles, size);
        const mien::ClaheSpan x = mien::clahe_span(tiles, i % size);
        const mien::ClaheSpan y = mien::clahe_span(tiles, i / size);
        const uint8_t *levels = call.levels + n * call.max_tiles * call.max_tiles * 256 + lab.l;
        const uint8_t *upper = levels + y.first * num_tiles * 256;
        const uint8_t *lower = levels + y.second * num_tiles * 256;
        lab.l = mien::clahe_blend(x, y, __ldg(upper + x.first * 256), __ldg(upper + x.second * 256),
                                  __ldg(lower + x.first * 256), __ldg(lower + x.second * 256));
    }
    word = (word & 0xFF000000u) | mien::bgr_of(kColors, lab);
}

// ---- stores -----------------------------------------------------------------------------------

__device__ uint32_t half_bits(int type, int level) {
    const float value = mien::unit_level(level);
    return type == MIEN_BFLOAT16 ? mien::bfloat16_bits(value) : mien::float16_bits(value);
}

__device__ void store_level(void *out, int type, int64_t at, int level) {
    if (type == MIEN_FLOAT32)
        static_cast<float *>(out)[at] = mien::unit_level(level);
    else
        static_cast<uint16_t *>(out)[at] = static_cast<uint16_t>(half_bits(type, level));
}

// `pixel` counts over the whole batch.
__device__ void store_pixel(void *out, int type, int rgb, int64_t pixel, uint32_t word) {
    store_level(out, type, 3 * pixel, mien::level_of(word, rgb ? 2 : 0));
    store_level(out, type, 3 * pixel + 1, mien::level_of(word, 1));
    store_level(out, type, 3 * pixel + 2, mien::level_of(word, rgb ? 0 : 2));
}

// The same with five zeros behind it: 16 bytes, or twice 16, at once.
__device__ void store_wide_pixel(void *out, int type, int rgb, int64_t pixel, uint32_t word) {
    const int first = mien::level_of(word, rgb ? 2 : 0), second = mien::level_of(word, 1);
    const int third = mien::level_of(word, rgb ? 0 : 2);
    if (type == MIEN_FLOAT32) {
        float4 *at = static_cast<float4 *>(out) + 2 * pixel;
        at[0] = make_float4(mien::unit_level(first), mien::unit_level(second),
                            mien::unit_level(third), 0.0f);
        at[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    } else {
        static_cast<uint4 *>(out)[pixel] = make_uint4(
            half_bits(type, first) | (half_bits(type, second) << 16), half_bits(type, third), 0, 0);
    }
}

__device__ void store_output(const Call &call, const Output &out, int64_t pixel, uint32_t picture,
                             uint32_t areas) {
    store_pixel(out.target, out.type, call.rgb, pixel, picture);
    const float mask = mien::unit_level(mien::level_of(picture, 3));
    float weight = 1.0f;
    if (call.penalize)
        weight = call.with_areas
                     ? mien::pixel_weight(call.eye_extra, call.mouth_extra, picture, areas)
                     : mask;
    out.weight[pixel] = weight;
    if (out.mask) out.mask[pixel] = mask;
}

// ---- affine and flip --------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) transform_kernel(const Call call, const Outputs full) {
    const int64_t n = blockIdx.y;
    const int size = call.size, i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size * size) return;
    const mien::Taps taps =
        mien::affine_taps(call.rows[n * size + i / size], call.columns[n * size + i % size], size);
    const int64_t pixel = n * size * size + i;
    const uint2 *staged = call.staged + n * size * size;
    const uint2 top_left = __ldg(staged + taps.top_left);
    const uint2 top_right = __ldg(staged + taps.top_right);
    const uint2 bottom_left = __ldg(staged + taps.bottom_left);
    const uint2 bottom_right = __ldg(staged + taps.bottom_right);
    const uint32_t picture = mien::blend_words(top_left.x, top_right.x, bottom_left.x,
                                               bottom_right.x, taps.right, taps.down);
    uint32_t areas = 0;
    if (call.with_areas) {
        areas = mien::blend_words(top_left.y, top_right.y, bottom_left.y, bottom_right.y,
                                  taps.right, taps.down);
        call.areas[pixel] = areas;
    }
    call.picture[pixel] = picture;
    for (int k = 0; k < full.count; ++k) store_output(call, full.of[k], pixel, picture, areas);
}

// ---- the other sizes --------------------------------------------------------------------------

__device__ uint32_t resized(const uint32_t *picture, int from_px, int to_px, int x, int y,
                            mien::Midway midway) {
    const int ratio = from_px / to_px;
    if (ratio * to_px == from_px)
        return mien::box_mean(picture + y * ratio * from_px + x * ratio, from_px, ratio, midway);
    return mien::area_mean(picture, from_px, mien::area_span(x, from_px, to_px),
                           mien::area_span(y, from_px, to_px));
}

// blockIdx.z: the output.
__global__ void __launch_bounds__(kThreads) outputs_kernel(const Call call, const Outputs small) {
    const Output &out = small.of[blockIdx.z];
    const int64_t n = blockIdx.y;
    const int size = call.size, edge = out.edge;
    const int i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= edge * edge) return;
    const int64_t start = n * size * size;
    const mien::Midway midway = call.with_areas ? mien::kToEven : mien::kUp;
    const uint32_t picture = resized(call.picture + start, size, edge, i % edge, i / edge, midway);
    const uint32_t areas =
        call.with_areas ? resized(call.areas + start, size, edge, i % edge, i / edge, midway) : 0;
    store_output(call, out, n * edge * edge + i, picture, areas);
}

// ---- warp to landmarks ------------------------------------------------------------------------

constexpr int kMeshThreads = 160;  // one for each triangle
// Of the map, a warp a row: chosen on the CPU, unmeasured on a GPU.
constexpr int kTileWidth = 32, kTileHeight = kThreads / kTileWidth;

// blockIdx.x: the face.
__global__ void __launch_bounds__(kMeshThreads) triangles_kernel(const Call call) {
    __shared__ mien::Mesh mesh;
    __shared__ int count;
    const int64_t n = blockIdx.x;
    const mien_face &face = call.params[n];
    if (face.warp != MIEN_WARP_LANDMARKS) return;
    const bool of_b = n >= call.begin_b;
    const int64_t here = index_in(face.index, of_b ? call.num_faces[1] : call.num_faces[0]);
    const int32_t *nearest = (of_b ? call.nearest[1] : call.nearest[0]) + here * MIEN_NEAREST;
    const int64_t there = index_in(nearest[mien::clamp_int(face.near, 0, MIEN_NEAREST - 1)],
                                   of_b ? call.num_faces[0] : call.num_faces[1]);
    const float *source = of_b ? call.landmarks[1] : call.landmarks[0];
    const float *destination = of_b ? call.landmarks[0] : call.landmarks[1];
    if (threadIdx.x == 0) count = 0;
    mien::make_patches(face, source + here * 2 * MIEN_LANDMARKS,
                       destination + there * 2 * MIEN_LANDMARKS, call.size, &mesh,
                       call.patches + n * mien::kMaxTriangles, &count);
    if (threadIdx.x == 0) call.num_patches[n] = count;
}

// blockIdx.x: a tile of kTileWidth x kTileHeight pixels; blockIdx.y: the face.
__global__ void __launch_bounds__(kThreads) map_kernel(const Call call) {
    __shared__ mien::Patch patches[mien::kMaxTriangles];  // those that reach into the tile
    __shared__ int count;
    const int64_t n = blockIdx.y;
    if (call.params[n].warp != MIEN_WARP_LANDMARKS) return;
    const int size = call.size, tiles = (size + kTileWidth - 1) / kTileWidth;
    const int left = static_cast<int>(blockIdx.x) % tiles * kTileWidth;
    const int top = static_cast<int>(blockIdx.x) / tiles * kTileHeight;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const int total = call.num_patches[n];
    for (int i = static_cast<int>(threadIdx.x); i < total; i += kThreads) {
        const mien::Patch patch = call.patches[n * mien::kMaxTriangles + i];
        const mien::Box box = mien::box_of(patch, size);
        if (box.left < left + kTileWidth && box.right >= left && box.top < top + kTileHeight &&
            box.bottom >= top)
            patches[mien::take(&count)] = patch;
    }
    __syncthreads();
    const int x = left + static_cast<int>(threadIdx.x) % kTileWidth;
    const int y = top + static_cast<int>(threadIdx.x) / kTileWidth;
    if (x >= size || y >= size) return;
    for (int i = 0; i < count; ++i) {
        if (!mien::contains(patches[i], x, y, size)) continue;
        const mien::Position from = mien::mapped(patches[i], x, y);
        call.map[(n * size + y) * size + x] = make_float2(from.x, from.y);
        return;
    }
}

// ---- random warp ------------------------------------------------------------------------------

__device__ uint32_t word_or_border(const uint32_t *picture, int size, int x, int y) {
    const bool inside = x >= 0 && x < size && y >= 0 && y < size;
    return inside ? __ldg(picture + y * size + x) : 0;
}

// Out of a picture whose edge is repeated; `step` words from pixel to pixel.
__device__ uint32_t repeated_word(const uint32_t *picture, int step, int size, float x, float y) {
    const mien::EdgePlace column = mien::edge_place_of(x, size);
    const mien::EdgePlace row = mien::edge_place_of(y, size);
    const uint32_t *upper = picture + step * row.first * size;
    const uint32_t *lower = picture + step * row.second * size;
    const int left = step * column.first, right = step * column.second;
    return mien::mix_words(__ldg(upper + left), __ldg(upper + right), __ldg(lower + left),
                           __ldg(lower + right), column.part, row.part);
}

// Where pixel (x, y) of the randomly warped face n comes from.
__device__ mien::Position grid_position(const Call &call, int64_t n, int x, int y) {
    const int size = call.size;
    const float *grid_x = call.grid + n * 10 * size, *grid_y = grid_x + 5 * size;
    const mien::GridSpan span = mien::grid_span(y, size);
    const int upper = span.first * size + x;
    const int lower = (span.first < 4 ? span.first + 1 : 4) * size + x;
    return {mien::mix(__ldg(grid_x + upper), __ldg(grid_x + lower), span.part),
            mien::mix(__ldg(grid_y + upper), __ldg(grid_y + lower), span.part)};
}

// Pixel (x, y) of the warped face n.
__device__ uint32_t warped_word(const Call &call, int64_t n, int x, int y) {
    const int size = call.size;
    const int64_t start = n * size * size;
    const bool to_landmarks = call.params[n].warp == MIEN_WARP_LANDMARKS;
    mien::Position place;
    if (to_landmarks) {
        const float2 from = __ldg(call.map + start + y * size + x);
        place = {from.x, from.y};
    } else {
        place = grid_position(call, n, x, y);
    }
    if (call.single_interpolation) {
        const mien::Back back = call.back[n];
        const uint32_t *staged = reinterpret_cast<const uint32_t *>(call.staged + start);
        return repeated_word(staged, 2, size, mien::back_x(back, place.x, place.y),
                             mien::back_y(back, place.x, place.y));
    }
    const uint32_t *picture = call.picture + start;
    if (to_landmarks) return repeated_word(picture, 1, size, place.x, place.y);
    const mien::Place column = mien::place_of(place.x, size), row = mien::place_of(place.y, size);
    return mien::mix_words(word_or_border(picture, size, column.first, row.first),
                           word_or_border(picture, size, column.first + 1, row.first),
                           word_or_border(picture, size, column.first, row.first + 1),
                           word_or_border(picture, size, column.first + 1, row.first + 1),
                           column.part, row.part);
}

// The warp alone, for an input that is neither S nor half of it.
__global__ void __launch_bounds__(kThreads) warp_kernel(const Call call) {
    const int64_t n = blockIdx.y;
    const int size = call.size, i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= size * size) return;
    const int64_t pixel = n * size * size + i;
    call.warped[pixel] = warp_of(call, call.params[n]) ? warped_word(call, n, i % size, i / size)
                                                       : call.picture[pixel];
}

// kRatio: S / input_px where both the warp and the mean of a box are made here; 0 where the warped
// picture lies in the workspace.
template <int kRatio>
__global__ void __launch_bounds__(kThreads) input_kernel(const Call call, const Input input) {
    const int64_t n = blockIdx.y;
    const int size = call.size, edge = call.input_px;
    const int i = static_cast<int>(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= edge * edge) return;
    const int x = i % edge, y = i / edge;
    uint32_t word;
    if constexpr (kRatio == 0) {
        word = resized(call.warped + n * size * size, size, edge, x, y, mien::kUp);
    } else {
        const uint32_t *picture = call.picture + n * size * size;
        const bool warp = warp_of(call, call.params[n]) != MIEN_NO_WARP;
        uint32_t box[kRatio * kRatio];
#pragma unroll
        for (int k = 0; k < kRatio * kRatio; ++k) {
            const int at_x = kRatio * x + k % kRatio, at_y = kRatio * y + k / kRatio;
            box[k] = warp ? warped_word(call, n, at_x, at_y) : __ldg(picture + at_y * size + at_x);
        }
        word = kRatio == 1 ? box[0] : mien::box_mean(box, kRatio, kRatio, mien::kUp);
    }
    const int64_t pixel = n * edge * edge + i;
    if (input.channels == 3)
        store_pixel(input.pixels, input.type, call.rgb, pixel, word);
    else
        store_wide_pixel(input.pixels, input.type, call.rgb, pixel, word);
}

// ---- draw -------------------------------------------------------------------------------------

// As many as a block may have, since there is one. Chosen on the CPU, unmeasured on a GPU.
constexpr int kDrawThreads = 1024;

// One block, a warp for each face: only when all have read the counters may they be moved on.
__global__ void __launch_bounds__(kDrawThreads)
    draw_kernel(const mien_ranges ranges, const mien_draw_job job) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int64_t rows = job.num_sides * job.count;
    for (int64_t row = threadIdx.x / 32; row < rows; row += kDrawThreads / 32)
        mien::draw_row(ranges, job, row, lane, 32);
    __syncthreads();
    if (job.counters && threadIdx.x < job.num_sides)
        job.counters[threadIdx.x] = mien::serial_of(job.counters[threadIdx.x], job.advance, 0);
}

mien_status launched(const char *what) {
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return MIEN_OK;
    return mien::fail(MIEN_CUDA_ERROR, "%s: %s", what, cudaGetErrorString(error));
}

unsigned blocks_for(int64_t items) {
    return static_cast<unsigned>((items + kThreads - 1) / kThreads);
}

}  // namespace

mien_status mien_draw_cuda(const mien_ranges *ranges, const mien_draw_job *job, void *stream) {
    const mien_status status = mien::check_draw(ranges, job);
    if (status != MIEN_OK || job->count == 0) return status;
    draw_kernel<<<1, kDrawThreads, 0, static_cast<cudaStream_t>(stream)>>>(*ranges, *job);
    return launched("draw");
}

int64_t mien_augment_workspace_bytes(const mien_augment_job *job) {
    return mien::check_job(job) == MIEN_OK ? layout_of(*job).bytes : 0;
}

mien_status mien_augment_cuda(const mien_augment_job *job, void *workspace, int64_t workspace_bytes,
                              void *stream) {
    if (const mien_status status = mien::check_job(job)) return status;
    if (job->count == 0) return MIEN_OK;
    if (const mien_status status = mien::check_pointers(job)) return status;
    if (job->count > 65535)
        return mien::fail(MIEN_INVALID_ARGUMENT, "count must be at most 65535, got %lld",
                          static_cast<long long>(job->count));
    const Layout layout = layout_of(*job);
    if (const mien_status status = mien::check_workspace(workspace, workspace_bytes, layout.bytes))
        return status;
    const auto at = [workspace](int64_t offset) { return static_cast<char *>(workspace) + offset; };
    Call call{};
    for (int side = 0; side < job->num_sides; ++side) {
        call.faces[side] = reinterpret_cast<const uint2 *>(job->faces[side]);
        call.num_faces[side] = job->num_faces[side];
    }
    call.params = job->params;
    call.gathered = job->gathered != 0;
    call.begin_b = job->count / job->num_sides;
    call.size = job->size_px;
    call.input_px = job->input_px;
    call.rgb = job->rgb;
    call.staged = reinterpret_cast<uint2 *>(at(layout.staged));
    call.picture = reinterpret_cast<uint32_t *>(at(layout.picture));
    call.areas = reinterpret_cast<uint32_t *>(at(layout.areas));
    call.warped = reinterpret_cast<uint32_t *>(at(layout.warped));
    call.levels = reinterpret_cast<uint8_t *>(at(layout.levels));
    call.columns = reinterpret_cast<mien::Steps *>(at(layout.columns));
    call.rows = reinterpret_cast<mien::Steps *>(at(layout.rows));
    call.grid = reinterpret_cast<float *>(at(layout.grid));
    for (int side = 0; job->to_landmarks && side < job->num_sides; ++side) {
        call.landmarks[side] = job->landmarks[side];
        call.nearest[side] = job->nearest[side];
    }
    call.patches = reinterpret_cast<mien::Patch *>(at(layout.patches));
    call.num_patches = reinterpret_cast<int *>(at(layout.num_patches));
    call.map = reinterpret_cast<float2 *>(at(layout.map));
    call.back = reinterpret_cast<mien::Back *>(at(layout.back));
    call.single_interpolation = job->single_interpolation != 0;
    call.max_tiles = layout.max_tiles;
    call.penalize = job->penalize != 0;
    call.with_areas = job->penalize && (job->eye_extra > 0 || job->mouth_extra > 0);
    call.eye_extra = job->eye_extra;
    call.mouth_extra = job->mouth_extra;

    const mien::Launches also = mien::launches_of(*job);
    Outputs full{}, small{};  // of the store's size, and smaller
    int largest_small = 0;
    for (int i = 0; i < job->num_outputs; ++i) {
        const int edge = job->output_px[i];
        Outputs &group = edge == job->size_px ? full : small;
        group.of[group.count++] = {job->targets[i], job->weights[i],
                                   i == job->num_outputs - 1 ? job->mask : nullptr, edge,
                                   job->target_type};
        if (edge < job->size_px && edge > largest_small) largest_small = edge;
    }

    const auto faces = static_cast<unsigned>(job->count);
    const int64_t area = int64_t{job->size_px} * job->size_px;
    const cudaStream_t queue = static_cast<cudaStream_t>(stream);
    const auto tiles = static_cast<unsigned>(layout.max_tiles);
    const dim3 pixels(blocks_for(area), faces);
    gather_kernel<<<dim3(pixels.x + 1, faces), kThreads, 0, queue>>>(call);
    tables_kernel<<<dim3(tiles * tiles, faces), kThreads, 0, queue>>>(call);
    color_kernel<<<pixels, kThreads, 0, queue>>>(call);
    transform_kernel<<<pixels, kThreads, 0, queue>>>(call, full);
    if (also.outputs) {
        const unsigned blocks = blocks_for(int64_t{largest_small} * largest_small);
        const dim3 grid(blocks, faces, static_cast<unsigned>(small.count));
        outputs_kernel<<<grid, kThreads, 0, queue>>>(call, small);
    }
    if (also.landmarks) {
        const int64_t size = job->size_px;
        const int64_t tiles_in_map =
            (size + kTileWidth - 1) / kTileWidth * ((size + kTileHeight - 1) / kTileHeight);
        triangles_kernel<<<faces, kMeshThreads, 0, queue>>>(call);
        map_kernel<<<dim3(static_cast<unsigned>(tiles_in_map), faces), kThreads, 0, queue>>>(call);
    }
    const dim3 inputs(blocks_for(int64_t{job->input_px} * job->input_px), faces);
    const Input input{job->input, job->input_type, job->input_channels};
    if (also.warp) {
        warp_kernel<<<pixels, kThreads, 0, queue>>>(call);
        input_kernel<0><<<inputs, kThreads, 0, queue>>>(call, input);
    } else if (job->size_px == job->input_px) {
        input_kernel<1><<<inputs, kThreads, 0, queue>>>(call, input);
    } else {
        input_kernel<2><<<inputs, kThreads, 0, queue>>>(call, input);
    }
    return launched("augment");
}
