// Which loss a call is of, and how many numbers a plane of it needs room for.
#pragma once

#include "filtered_loss_gradients.cuh"
#include "filtered_loss_laplacian.cuh"
#include "filtered_loss_scales.cuh"

namespace mien {

template <int kKind, class Lanes>
MIEN_HD void run_planes(const FilteredCall &call, const Team &team, int64_t first_plane,
                        Lanes *room) {
    const Planes<Lanes> planes = planes_at<Lanes>(call, first_plane);
    if constexpr (kKind == MIEN_PIXEL_GRADIENT_DIFF) pixel_gradient_diff(call, team, planes, room);
    if constexpr (kKind == MIEN_GMSD) gmsd(call, team, planes, room);
    if constexpr (kKind == MIEN_LAPLOSS) laploss(call, team, planes, room);
    if constexpr (kKind == MIEN_MS_SSIM) ms_ssim(call, team, planes, room);
}

// Maps of every level, maps of the whole picture, and a number a column of it.
inline int64_t room_numbers(const FilteredCall &call) {
    struct Maps {
        int levels, whole;
    };
    constexpr Maps kMaps[] = {{0, kDifferenceMaps},
                              {0, kEdgeMaps},
                              {kLaplacianMaps, kLaplacianWholeMaps},
                              {kScaleMaps, kScaleWholeMaps}};
    const Maps maps = kMaps[call.kind];
    return maps.levels * start_of(call, call.levels) + maps.whole * area_of(call, 0) + call.size;
}

}  // namespace mien
