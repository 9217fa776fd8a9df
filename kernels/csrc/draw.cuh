// All random numbers of one face, as a pure function of (seed, side, serial number).
#pragma once

#include "mien.h"
#include "philox.cuh"

namespace mien {

// The counter is (serial number: 64 bits, purpose and side: 32 bits, block: 32 bits).
enum Purpose : uint32_t { kOrder = 0, kColor = 1, kTransform = 2, kWarp = 3, kLandmarks = 4 };

MIEN_HD Words random_words(uint64_t seed, uint64_t serial, Purpose purpose, int32_t side,
                           uint32_t block) {
    const uint32_t stream = (static_cast<uint32_t>(purpose) << 8) | static_cast<uint32_t>(side);
    return philox(static_cast<uint32_t>(serial), static_cast<uint32_t>(serial >> 32), stream, block,
                  seed);
}

// Tiles along an edge that CLAHE starts from, and by how many each step refines it.
MIEN_HD int clahe_base(int size_px) { return size_px / 128 > 2 ? size_px / 128 : 2; }
MIEN_HD int clahe_tiles(int size_px, int steps) {
    return steps * (clahe_base(size_px) / 2) + clahe_base(size_px);
}

// Noise is drawn four numbers at a time; of the grid's last block two are used.
constexpr int kGridBlocks = 13, kLandmarkBlocks = MIEN_LANDMARKS / 2;

// Forward affine about the picture's centre: turn, zoom, then shift.
MIEN_HD void affine_matrix(float turns, float zoom, float shift_x, float shift_y, int size_px,
                           float matrix[6]) {
    const SineCosine angle = sine_cosine(turns);
    const float alpha = zoom * angle.cosine, beta = zoom * angle.sine;
    const float centre = 0.5f * static_cast<float>(size_px - 1);
    const float rest = centre * (1.0f - alpha);
    matrix[0] = alpha;
    matrix[1] = beta;
    matrix[2] = (rest - centre * beta) + shift_x;
    matrix[3] = -beta;
    matrix[4] = alpha;
    matrix[5] = (centre * beta + rest) + shift_y;
}

// All but the noise of the warp.
MIEN_HD void draw_change(const mien_ranges &ranges, uint64_t seed, int32_t side, int64_t serial,
                         int64_t num_faces, int32_t size_px, mien_face *face) {
    const uint64_t epoch = static_cast<uint64_t>(serial / num_faces);
    face->index =
        permuted(serial % num_faces, num_faces, random_words(seed, epoch, kOrder, side, 0),
                 random_words(seed, epoch, kOrder, side, 1));
    const uint64_t number = static_cast<uint64_t>(serial);

    const Words shade = random_words(seed, number, kColor, side, 0);
    const Words contrast = random_words(seed, number, kColor, side, 1);
    face->color = ranges.color != 0;
    face->lab[0] = symmetric(shade.word[0]) * (ranges.lightness_percent * 0.01f);
    face->lab[1] = symmetric(shade.word[1]) * (ranges.ab_percent * 0.01f);
    face->lab[2] = symmetric(shade.word[2]) * (ranges.ab_percent * 0.01f);
    const uint32_t steps =
        below(contrast.word[0], static_cast<uint32_t>(ranges.clahe_max_size) + 1);
    face->clahe_tiles = happens(shade.word[3], ranges.clahe_chance_percent)
                            ? clahe_tiles(size_px, static_cast<int>(steps))
                            : 0;

    const Words place = random_words(seed, number, kTransform, side, 0);
    const Words mirror = random_words(seed, number, kTransform, side, 1);
    const float shift = ranges.shift_percent * 0.01f * static_cast<float>(size_px);
    affine_matrix(symmetric(place.word[0]) * (ranges.rotation_degrees * (1.0f / 360.0f)),
                  1.0f + symmetric(place.word[1]) * (ranges.zoom_percent * 0.01f),
                  symmetric(place.word[2]) * shift, symmetric(place.word[3]) * shift, size_px,
                  face->matrix);
    face->flip = ranges.flip != 0 && happens(mirror.word[0], ranges.flip_percent);

    face->warp = ranges.warp;
    face->near = 0;
    if (ranges.warp == MIEN_WARP_LANDMARKS)
        face->near = static_cast<int32_t>(below(
            random_words(seed, number, kLandmarks, side, kLandmarkBlocks).word[0], MIEN_NEAREST));
}

// Four of `total` normal numbers, or what is left of them.
MIEN_HD void draw_block(uint64_t seed, int64_t serial, Purpose purpose, int32_t side, float sigma,
                        int block, int total, float *noise) {
    const Words bend = random_words(seed, static_cast<uint64_t>(serial), purpose, side,
                                    static_cast<uint32_t>(block));
    noise += 4 * block;
    const Pair one = normals(bend.word[0], bend.word[1]);
    noise[0] = sigma * one.first;
    noise[1] = sigma * one.second;
    if (4 * block + 2 == total) return;
    const Pair two = normals(bend.word[2], bend.word[3]);
    noise[2] = sigma * two.first;
    noise[3] = sigma * two.second;
}

// Block `block` of the noise of both warps; that of landmarks is 0 where none is warped to.
MIEN_HD void draw_noise(const mien_ranges &ranges, uint64_t seed, int32_t side, int64_t serial,
                        int32_t size_px, int block, mien_face *face) {
    const float size = static_cast<float>(size_px);
    float *grid = &face->warp_noise[0][0][0], *landmarks = &face->landmark_noise[0][0];
    if (block < kGridBlocks)
        return draw_block(seed, serial, kWarp, side, (5.0f / 256.0f) * size, block, 50, grid);
    const int number = block - kGridBlocks;
    if (ranges.warp == MIEN_WARP_LANDMARKS)
        return draw_block(seed, serial, kLandmarks, side, (2.0f / 256.0f) * size, number,
                          2 * MIEN_LANDMARKS, landmarks);
    for (int i = 0; i < 4; ++i) landmarks[4 * number + i] = 0.0f;
}

// Serial number of a face; never negative, as a device counter cannot be refused: behind the last
// number of 63 bits comes 0.
MIEN_HD int64_t serial_of(int64_t first, int64_t counted, int64_t face) {
    const uint64_t sum =
        static_cast<uint64_t>(first) + static_cast<uint64_t>(counted) + static_cast<uint64_t>(face);
    return static_cast<int64_t>(sum & INT64_MAX);
}

// Row `row` of a job, the first `count` rows being faces of a and those behind them of b. `worker`
// of `num_workers` does its share: the first one the change, all of them the noise.
MIEN_HD void draw_row(const mien_ranges &ranges, const mien_draw_job &job, int64_t row, int worker,
                      int num_workers) {
    const int32_t side = row < job.count ? 0 : 1;
    const int64_t first = side == 0 ? job.first[0] : job.first[1];
    const int64_t num_faces = side == 0 ? job.num_faces[0] : job.num_faces[1];
    const int64_t counted = job.counters ? job.counters[side] : 0;
    const int64_t serial = serial_of(first, counted, row - side * job.count);
    mien_face *face = job.params + row;
    if (worker == 0) draw_change(ranges, job.seed, side, serial, num_faces, job.size_px, face);
    // From the last worker down, so that the first has the least noise besides.
    for (int block = num_workers - 1 - worker; block < kGridBlocks + kLandmarkBlocks;
         block += num_workers)
        draw_noise(ranges, job.seed, side, serial, job.size_px, block, face);
}

}  // namespace mien
