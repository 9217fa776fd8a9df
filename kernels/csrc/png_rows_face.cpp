// The filters of PNG's rows undone (PNG, third edition, section 9), for 8 bits of red, green, blue.
// A pixel is a vector of four numbers, of which the last means nothing: what a row depends on, the
// pixel before it, allows no wider one. Compiled once per instruction set.
#include <string.h>

#include "packed_pixel.h"
#include "png_rows.h"

namespace {

enum Filter { kNone = 0, kSub = 1, kUp = 2, kAverage = 3, kPaeth = 4 };

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

// A row under way: its next pixel, the one before that, and what is above the latter.
struct Row {
    const uint8_t *from;
    uint8_t *to;
    Pixel left{};
    Pixel before{};
};

// The next pixel; `above` holds the row before at this place, and then this one. Four bytes are
// read and written, which reach into the next pixel; of a row's last one, three.
template <int kFilter, int kRead = kBytes + 1>
void run_pixel(Row &row, Pixel *above) {
    const Pixel up = *above;
    row.left = (load<kRead>(row.from) + predicted<kFilter>(row.left, up, row.before)) & 255;
    row.before = up;
    *above = row.left;
    store<kRead, 2, 1, 0>(row.to, row.left);
    row.from += kBytes, row.to += kBytes;
}

template <int kFilter>
void run_row(const uint8_t *from, uint8_t *to, int32_t columns, Pixel *above) {
    Row row{from, to};
    Pixel *const last = above + columns - 1;
    for (; above != last; ++above) run_pixel<kFilter>(row, above);
    run_pixel<kFilter, kBytes>(row, last);
}

// Two rows of Paeth's filter, whose pixels wait for the one before them: meanwhile the lower row is
// worked on, a pixel behind, where the upper one has just left what is above it.
void run_two_rows(const uint8_t *from, uint8_t *to, int32_t columns, Pixel *above) {
    const int64_t width = int64_t{columns} * kBytes;
    Row upper{from, to}, lower{from + width + 1, to + width};
    Pixel *const first = above, *const last = above + columns - 1;
    for (; above != last; ++above) {
        run_pixel<kPaeth>(upper, above);
        if (above != first) run_pixel<kPaeth>(lower, above - 1);
    }
    run_pixel<kPaeth, kBytes>(upper, last);
    if (last != first) run_pixel<kPaeth>(lower, last - 1);
    run_pixel<kPaeth, kBytes>(lower, last);
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
        if (row + 1 < job.rows && from[0] == kPaeth && from[width + 1] == kPaeth) {
            run_two_rows(from + 1, to, job.columns, above);
            ++row;
            continue;
        }
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
