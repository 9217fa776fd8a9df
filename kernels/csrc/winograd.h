// What the builds of winograd_face.cpp share with the call that checks a job.
#pragma once

#include "mien.h"

namespace mien {

constexpr int kTilePoints = 16, kKernelPoints = 9;

// A transform, with its tiles: pixels of pictures NHWC, or weights [outputs, 3, 3, channels].
struct WinogradCall {
    float *pixels;
    float *tiles;  // [16, num_tiles, channels]
    int64_t num_tiles;
    int64_t tile_rows;
    int64_t tile_columns;
    int64_t rows;
    int64_t columns;
    int64_t channels;
    int32_t padding;
    int32_t transform;
    bool is_turned;
};

// Items first ... end - 1: tiles of pictures, or outputs of a kernel.
using WinogradItems = void (*)(const WinogradCall &call, int64_t first, int64_t end);
void winograd_face_baseline(const WinogradCall &call, int64_t first, int64_t end);
void winograd_face_avx2(const WinogradCall &call, int64_t first, int64_t end);

}  // namespace mien
