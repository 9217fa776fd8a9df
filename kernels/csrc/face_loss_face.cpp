// Both passes of the picture losses over one face. Compiled once per instruction set: with AVX2 a
// thread has vectors of eight neighbours, without it is what a GPU's thread is.
#include "face_loss.cuh"

namespace {

#if defined(__AVX2__) && defined(__FMA__)
using Lanes = mien::EightFloats;
#else
using Lanes = float;
#endif

constexpr int kThreads = mien::kLossThreads / mien::kWidth<Lanes>;

void add_up(const mien::LossCall &call, const mien::Tile &tile, mien::LossSums &sums) {
    const int64_t blocks = 2 * call.batch * call.tiles_x * call.tiles_y;
    for (int t = 0; t < mien::kLossThreads; ++t) mien::add_up_parts(call, t, sums);
    for (int t = 0; t < mien::kLossThreads; ++t)
        mien::add_up_block(call, blocks, tile.block, t, sums);
}

template <int kChannels, class RawPred, class RawTarget>
void face_with_ssim(const mien::LossCall &call, int64_t face) {
    const int64_t tiles = int64_t{call.tiles_x} * call.tiles_y;
    for (int64_t block = face * tiles; block < (face + 1) * tiles; ++block) {
        const mien::Tile tile = mien::tile_at(call, block);
        mien::ForwardShared shared;
        for (int t = 0; t < kThreads; ++t)
            mien::picture_columns<Lanes, kChannels, RawPred, RawTarget>(call, tile, t, shared);
        for (int t = 0; t < kThreads; ++t)
            mien::picture_rows<Lanes, kChannels>(call, tile, t, shared);
        add_up(call, tile, shared.sums);
    }
    for (int64_t block = face * tiles; block < (face + 1) * tiles; ++block) {
        const mien::Tile tile = mien::tile_at(call, block);
        mien::GradientShared shared;
        for (int t = 0; t < kThreads; ++t)
            mien::slope_columns<Lanes, kChannels>(call, tile, t, shared);
        for (int t = 0; t < kThreads; ++t)
            mien::slope_rows<Lanes, kChannels>(call, tile, t, shared);
    }
}

template <int kChannels>
void face_without_ssim(const mien::LossCall &call, int64_t face) {
    const int64_t tiles = int64_t{call.tiles_x} * call.tiles_y;
    for (int64_t block = face * tiles; block < (face + 1) * tiles; ++block) {
        const mien::Tile tile = mien::tile_at(call, block);
        mien::LossSums sums;
        for (int t = 0; t < kThreads; ++t) mien::pixel_rows<Lanes, kChannels>(call, tile, t, sums);
        add_up(call, tile, sums);
    }
}

template <int kChannels>
void face_of_channels(const mien::LossCall &call, int64_t face) {
    const bool wide_pred = call.pred_type == MIEN_FLOAT32;
    const bool wide_target = call.target_type == MIEN_FLOAT32;
    if (!call.asked[MIEN_SSIM])
        face_without_ssim<kChannels>(call, face);
    else if (wide_pred && wide_target)
        face_with_ssim<kChannels, float, float>(call, face);
    else if (wide_pred)
        face_with_ssim<kChannels, float, uint16_t>(call, face);
    else if (wide_target)
        face_with_ssim<kChannels, uint16_t, float>(call, face);
    else
        face_with_ssim<kChannels, uint16_t, uint16_t>(call, face);
}

}  // namespace

namespace mien {

void MIEN_FACE_LOSS_FACE(const LossCall &call, int64_t face) {
    if (call.channels == 3)
        face_of_channels<3>(call, face);
    else
        face_of_channels<1>(call, face);
}

}  // namespace mien
