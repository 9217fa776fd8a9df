// One call of a loss by filters, as its teams see it.
#pragma once

#include <stdint.h>

#include "mien.h"

namespace mien {

constexpr int kMaxLevels = 6;

// A matrix with a run of numbers in each row: out[i] = sum of taps[i][k] * in[first[i] + k].
struct Band {
    const int32_t *first;
    const float *taps;
    int size, from_size, num_taps;
};

struct Filter {
    Band forward, transposed;
};

// Everything a team needs; passed by value to the kernels.
struct FilteredCall {
    const float *pred, *target, *weight;
    float *values, *gradient;
    float *rooms;                 // one after the other
    int64_t num_planes, numbers;  // of a plane's room
    int channels, size, kind;
    int levels;  // of the pyramid; level k has an edge of sizes[k]
    int sizes[kMaxLevels];
    Filter filters[MIEN_MAX_FILTERS];
};

// Check a job, and lay out its workspace.
mien_status prepare_filtered_loss(const mien_filtered_loss_job *job, void *workspace,
                                  int64_t workspace_bytes, FilteredCall *call);

// Planes that a thread of the CPU works on, all at once where it has the lanes.
constexpr int kPlanesAtOnce = 8;

// Up to kPlanesAtOnce planes on one CPU thread, in a room of as many; filtered_loss_face.cpp is
// compiled once for each of these instruction sets.
using FilteredLossPlanes = void (*)(const FilteredCall &call, int64_t first_plane, float *room);

void filtered_loss_face_baseline(const FilteredCall &call, int64_t first_plane, float *room);
void filtered_loss_face_avx2(const FilteredCall &call, int64_t first_plane, float *room);

}  // namespace mien
