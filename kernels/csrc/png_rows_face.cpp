// The filters of PNG's rows undone (PNG, third edition, section 9), for 8 bits of red, green, blue.
// A pixel is a vector of four numbers, of which the last means nothing: what a row depends on, the
// pixel before it, allows no wider one. Compiled once per instruction set.
#include <string.h>

#include "png_rows.h"

namespace {

typedef int32_t Pixel __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(4)));

enum Filter { kNone = 0, kSub = 1, kUp = 2, kAverage = 3, kPaeth = 4 };

constexpr int kBytes = 3;  // of a pixel

template <int kRead>
Pixel load(const uint8_t *from) {
    Bytes packed{};
    memcpy(&packed, from, kRead);
    return __builtin_convertvector(packed, Pixel);
}

template <int kWritten>
void store_turned(uint8_t *to, Pixel pixel) {
    const Pixel turned = __builtin_shufflevector(pixel, pixel, 2, 1, 0, 3);
    const Bytes packed = __builtin_convertvector(turned, Bytes);
    memcpy(to, &packed, kWritten);
}

Pixel absolute(Pixel value) { return value < 0 ? -value : value; }

// Of left, above and what is before above, the one that is nearest to left + above - before.
Pixel paeth(Pixel left, Pixel above, Pixel before) {
    const Pixel by_above = above - before, by_left = left - before;
    const Pixel to_left = absolute(by_above), to_above = absolute(by_left);
    const Pixel to_before = absolute(by_above + by_left);
    const Pixel other = to_above <= to_before ? above : before;
    return (to_left <= to_above) & (to_left <= to_before) ? left : other;
}

template <int kFilter>
Pixel predicted(Pixel left, Pixel above, Pixel before) {
    switch (kFilter) {
        case kSub:
            return left;
        case kUp:
            return above;
        case kAverage:
            return (left + above) >> 1;
        case kPaeth:
            return paeth(left, above, before);
        default:
            return Pixel{};
    }
}

template <int kFilter, int kRead>
void run_pixel(const uint8_t *from, uint8_t *to, Pixel *above, Pixel *left, Pixel *before) {
    const Pixel up = *above;
    *left = (load<kRead>(from) + predicted<kFilter>(*left, up, *before)) & 255;
    *before = up;
    *above = *left;
    store_turned<kRead>(to, *left);
}

// One row; `above` holds the row before it and then this one. Four bytes are read and written of
// each pixel, which reach into the next; of the last, three.
template <int kFilter>
void run_row(const uint8_t *from, uint8_t *to, int32_t columns, Pixel *above) {
    Pixel left{}, before{};
    for (; columns > 1; --columns, from += kBytes, to += kBytes)
        run_pixel<kFilter, kBytes + 1>(from, to, above++, &left, &before);
    run_pixel<kFilter, kBytes>(from, to, above, &left, &before);
}

}  // namespace

namespace mien {

bool MIEN_PNG_ROWS_FACE(const mien_png_job &job, int32_t *room) {
    Pixel *above = reinterpret_cast<Pixel *>(room);
    memset(room, 0, job.columns * sizeof(Pixel));
    const int64_t width = int64_t{job.columns} * kBytes;
    for (int32_t row = 0; row < job.rows; ++row) {
        const uint8_t *from = job.filtered + row * (width + 1);
        uint8_t *to = job.pixels + row * width;
        switch (*from++) {
            case kNone:
                run_row<kNone>(from, to, job.columns, above);
                break;
            case kSub:
                run_row<kSub>(from, to, job.columns, above);
                break;
            case kUp:
                run_row<kUp>(from, to, job.columns, above);
                break;
            case kAverage:
                run_row<kAverage>(from, to, job.columns, above);
                break;
            case kPaeth:
                run_row<kPaeth>(from, to, job.columns, above);
                break;
            default:
                return false;
        }
    }
    return true;
}

}  // namespace mien
