// One face on one CPU thread. augment_face.cpp is compiled once for each of these instruction sets.
#pragma once

#include <stddef.h>

#include "color_avx2.h"
#include "mien.h"

namespace mien {

// The stored form of every level: level / 255 as float32, bfloat16, float16.
struct LevelTables {
    uint32_t float32[256];
    uint16_t bfloat16[256];
    uint16_t float16[256];
};

struct FaceCall {
    const mien_augment_job *job;
    const ColorTables *colors;
    const LabTables *lab;
    const LevelTables *levels;
};

// Bytes of scratch memory that a thread needs, for a 64-byte aligned start.
size_t face_scratch_bytes(const mien_augment_job &job);

using AugmentFace = void (*)(const FaceCall &call, int64_t face, unsigned char *scratch);

void augment_face_baseline(const FaceCall &call, int64_t face, unsigned char *scratch);
void augment_face_avx2(const FaceCall &call, int64_t face, unsigned char *scratch);

}  // namespace mien
