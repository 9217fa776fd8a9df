// One call of the picture losses, as its blocks see it.
#pragma once

#include <stdint.h>

#include "mien.h"

namespace mien {

// Numbers of a picture that a block makes. Chosen on the CPU, unmeasured on a GPU.
constexpr int kTileRows = 16, kTileLength = 96;
constexpr int kKinds = MIEN_NUM_LOSS_KINDS;

// Everything a block needs; passed by value to the kernels.
struct LossCall {
    const void *preds[2];
    const void *target;
    const float *weight;
    const float *scale;
    void *gradients[2];
    float *means;
    float *slopes;    // [kSlopeMaps, faces, height, stride]; none without SSIM
    float *partials;  // [kKinds, blocks]
    int64_t batch;    // faces of a side
    int64_t stride;   // numbers in a row of slopes: length, rounded up to 16 bytes
    int height, width, channels, length;
    int tiles_x, tiles_y;
    int pred_type, target_type;
    bool wide;  // runs of every tensor start at whole words of 16 (two-byte types: 8) bytes
    float inverse_count;
    int num_losses;
    int kinds[MIEN_MAX_LOSSES];
    float shares[kKinds];  // sum of the shares of a kind
    bool asked[kKinds];
};

// Check a job, and lay out its workspace.
mien_status prepare_face_loss(const mien_face_loss_job *job, void *workspace,
                              int64_t workspace_bytes, LossCall *call);

// Both passes over one face on one CPU thread; face_loss_face.cpp is compiled once for each of
// these instruction sets.
using FaceLossFace = void (*)(const LossCall &call, int64_t face);

void face_loss_face_baseline(const LossCall &call, int64_t face);
void face_loss_face_avx2(const LossCall &call, int64_t face);

}  // namespace mien
