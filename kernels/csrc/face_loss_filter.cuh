// The 11 x 11 Gaussian over a tile, with reflected borders, as two passes of 11 taps.
//
// A picture is NHWC: a row is `length` = width * channels numbers, and the taps along it are
// `channels` apart.
//
//   columns  each thread filters a column of the tile and of its margins downwards, out of the
//            pictures into `maps`; its window of rows stays in registers
//   rows     each thread filters a run of a row of `maps`, read once into registers for all taps
#pragma once

#include "face_loss_run.cuh"

namespace mien {

constexpr int kTaps = 11, kHalf = kTaps / 2;
constexpr int kMargin = 16;  // at least kHalf * 3, and whole words of 16 bytes
constexpr int kColumns = kTileLength + 2 * kMargin;
constexpr int kSourceRows = kTileRows + kTaps - 1;
constexpr int kPictureMaps = 4;  // x, y, xy, x^2 + y^2
constexpr int kSlopeMaps = 3;    // derivatives by Gx, Gxy and, doubled, G(x^2 + y^2)

static_assert(kColumns == kLossThreads && kTileRows * kTileLength / kRun == kLossThreads,
              "a thread has one column, then one run");

// exp(-(k - 5)^2 / (2 * 1.5^2)), normalised.
struct Taps11 {
    float at[kTaps];
};
MIEN_HD constexpr Taps11 gaussian_taps() {
    return {{0.00102838008447911f, 0.00759875813523919f, 0.03600077212843083f, 0.10936068950970002f,
             0.21300553771125368f, 0.26601172486179436f, 0.21300553771125368f, 0.10936068950970002f,
             0.03600077212843083f, 0.00759875813523919f, 0.00102838008447911f}};
}

// ---- columns ----------------------------------------------------------------------------------

// Reflected at 0 and last, as often as a position of a needed tap can be; any other stays inside.
MIEN_HD int reflected_at(int at, int last) {
    at = at < 0 ? -at : at;
    at = at < 2 * last - at ? at : 2 * last - at;
    return at < 0 ? 0 : at;
}

// Where the columns of a thread lie in a row of the picture.
template <class Lanes>
struct Place {
    int at[kWidth<Lanes>];
    bool straight;  // next to each other
};

template <class Lanes, int kChannels>
MIEN_HD Place<Lanes> place_in_row(const LossCall &call, int first) {
    Place<Lanes> place;
    place.straight = first >= 0 && first + kWidth<Lanes> <= call.length;
    for (int lane = 0; lane < kWidth<Lanes>; ++lane) {
        const int column =
            first + lane + kMargin * kChannels;  // not negative: division rounds down
        const int pixel = column / kChannels, channel = column - pixel * kChannels;
        place.at[lane] = reflected_at(pixel - kMargin, call.width - 1) * kChannels + channel;
    }
    return place;
}

template <class Lanes, class Raw>
MIEN_HD Lanes load_columns(const Raw *row, int type, const Place<Lanes> &place) {
    if constexpr (kWidth<Lanes> == 1) {
        return float_of(row[place.at[0]], type);
    } else {
        if constexpr (sizeof(Raw) == sizeof(float))
            if (place.straight) return load_lanes<Lanes>(row + place.at[0]);
        float values[kWidth<Lanes>];
        for (int lane = 0; lane < kWidth<Lanes>; ++lane)
            values[lane] = float_of(row[place.at[lane]], type);
        return load_lanes<Lanes>(values);
    }
}

template <class Lanes, class RawPred, class RawTarget>
struct PictureRows {
    static constexpr int kMaps = kPictureMaps;
    const RawPred *pred;
    const RawTarget *target;
    int pred_type, target_type;
    Place<Lanes> place;
};

template <class Lanes>
struct SlopeRows {
    static constexpr int kMaps = kSlopeMaps;
    const float *slopes;
    int64_t plane;
    Place<Lanes> place;
};

// One row of every map of a source, `next` apart, from where the row starts. Of pictures these are
// x - 1/2, y - 1/2, their product and the sum of their squares: variances are small differences of
// these, and smaller numbers have smaller roundings.
template <class Lanes, class RawPred, class RawTarget>
MIEN_HD void load_row(const PictureRows<Lanes, RawPred, RawTarget> &source, int64_t start,
                      Lanes *values, int next) {
    const Lanes x = load_columns<Lanes>(source.pred + start, source.pred_type, source.place) - 0.5f;
    const Lanes y =
        load_columns<Lanes>(source.target + start, source.target_type, source.place) - 0.5f;
    values[0] = x;
    values[next] = y;
    values[2 * next] = x * y;
    values[3 * next] = fused(x, x, y * y);
}

template <class Lanes>
MIEN_HD void load_row(const SlopeRows<Lanes> &source, int64_t start, Lanes *values, int next) {
    MIEN_UNROLL
    for (int map = 0; map < kSlopeMaps; ++map)
        values[map * next] =
            load_columns<Lanes>(source.slopes + map * source.plane + start, 0, source.place);
}

template <int kMaps>
struct alignas(64) TileMaps {
    float at[kMaps][kTileRows][kColumns];
};

// `stride`: numbers from a row of the source to the next; `thread`: 0 .. kLossThreads / kWidth - 1.
template <class Lanes, class Source>
MIEN_HD void filter_columns(const LossCall &call, const Tile &tile, const Source &source,
                            int64_t stride, int thread, TileMaps<Source::kMaps> &maps) {
    constexpr int kMaps = Source::kMaps;
    constexpr Taps11 taps = gaussian_taps();
    Lanes values[kMaps][kSourceRows];
    MIEN_UNROLL
    for (int row = 0; row < kSourceRows; ++row) {
        const int from = reflected_at(tile.first_row - kHalf + row, call.height - 1);
        load_row(source, from * stride, &values[0][row], kSourceRows);
        const int to = row - (kTaps - 1);
        if (to < 0) continue;
        MIEN_UNROLL
        for (int map = 0; map < kMaps; ++map) {
            Lanes sum = values[map][to] * taps.at[0];
            MIEN_UNROLL
            for (int k = 1; k < kTaps; ++k) sum = fused(values[map][to + k], taps.at[k], sum);
            store_lanes(&maps.at[map][to][thread * kWidth<Lanes>], sum);
        }
    }
}

// One run of each map, filtered along the row.
template <class Lanes, int kChannels, int kMaps>
MIEN_HD void filter_run(const TileMaps<kMaps> &maps, const Run<Lanes> &run,
                        float (&sums)[kMaps][Run<Lanes>::kLength]) {
    constexpr int kBefore = kMargin - kHalf * kChannels;  // from the margin's start to tap 0
    constexpr Taps11 taps = gaussian_taps();
    MIEN_UNROLL
    for (int map = 0; map < kMaps; ++map) {
        const float *line = &maps.at[map][run.row][run.start];
        if constexpr (kWidth<Lanes> == 1) {  // by words of 16 bytes, into registers
            constexpr int kFirst = kBefore / 4 * 4;
            constexpr int kWords = (kBefore + kRun + (kTaps - 1) * kChannels - kFirst + 3) / 4;
            Four<float> window[kWords];
            MIEN_UNROLL
            for (int word = 0; word < kWords; ++word)
                window[word] = *reinterpret_cast<const Four<float> *>(line + kFirst + 4 * word);
            MIEN_UNROLL
            for (int i = 0; i < kRun; ++i) {
                constexpr int kTap0 = kBefore - kFirst;
                float sum = window[(kTap0 + i) / 4].at[(kTap0 + i) % 4] * taps.at[0];
                MIEN_UNROLL
                for (int k = 1; k < kTaps; ++k) {
                    const int from = kTap0 + i + k * kChannels;
                    sum = fused(window[from / 4].at[from % 4], taps.at[k], sum);
                }
                sums[map][i] = sum;
            }
        } else {
            for (int i = 0; i < Run<Lanes>::kLength; i += kWidth<Lanes>) {
                const float *from = line + kBefore + i;
                Lanes sum = load_lanes<Lanes>(from) * taps.at[0];
                for (int k = 1; k < kTaps; ++k)
                    sum = fused(load_lanes<Lanes>(from + k * kChannels), taps.at[k], sum);
                store_lanes(&sums[map][i], sum);
            }
        }
    }
}

}  // namespace mien
