// The losses by filters of the planes that a thread has at once. Compiled once per instruction set:
// with AVX2 a plane is a lane of a vector of eight, without it planes follow each other.
#include "filtered_loss_run.cuh"

namespace {

#if defined(__AVX2__) && defined(__FMA__)
using Lanes = mien::EightFloats;
#else
using Lanes = float;
#endif

template <int kKind>
void run(const mien::FilteredCall &call, int64_t first_plane, float *room) {
    const mien::Team alone{0, 1};
    for (int plane = 0; plane < mien::kPlanesAtOnce; plane += mien::kWidth<Lanes>)
        if (first_plane + plane < call.num_planes)
            mien::run_planes<kKind>(call, alone, first_plane + plane,
                                    reinterpret_cast<Lanes *>(room));
}

}  // namespace

namespace mien {

void MIEN_FILTERED_LOSS_FACE(const FilteredCall &call, int64_t first_plane, float *room) {
    switch (call.kind) {
        case MIEN_PIXEL_GRADIENT_DIFF:
            return run<MIEN_PIXEL_GRADIENT_DIFF>(call, first_plane, room);
        case MIEN_GMSD:
            return run<MIEN_GMSD>(call, first_plane, room);
        case MIEN_LAPLOSS:
            return run<MIEN_LAPLOSS>(call, first_plane, room);
        default:
            return run<MIEN_MS_SSIM>(call, first_plane, room);
    }
}

}  // namespace mien
