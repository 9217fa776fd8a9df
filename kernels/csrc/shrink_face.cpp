// A picture of 8 bits of three colours made smaller: each pixel is the mean of the area it covers.
// Sums are taken along a row first, then down, in float and by rising pixels, which gives the bytes
// of OpenCV's INTER_AREA. A pixel is a vector of four numbers, of which the last means nothing.
// Compiled once per instruction set.
#include "packed_pixel.h"
#include "shrink.h"

namespace {

typedef float Numbers __attribute__((vector_size(16)));

// 1.5 * 2^23: a number below 2^22 added to it is rounded to a whole one, ties to even.
constexpr float kRounding = 12582912.0f;
constexpr int32_t kRoundingBits = 0x4b400000;

template <int kRead>
Numbers numbers(const uint8_t *from) {
    return __builtin_convertvector(load<kRead>(from), Numbers);
}

void read_row(const uint8_t *from, int32_t edge, Numbers *row) {
    // Four bytes of each pixel, which reach into the next; of the last, three.
    for (int32_t x = 0; x + 1 < edge; ++x, from += kBytes) row[x] = numbers<kBytes + 1>(from);
    row[edge - 1] = numbers<kBytes>(from);
}

// `kTaps`: of each pixel, or 0 for as many as `covers` says.
template <int kTaps>
void sum_row(const Numbers *row, mien::Covers covers, int32_t size, Numbers *sums) {
    const int32_t taps = kTaps ? kTaps : covers.taps;
    const float *weights = covers.weights;
    for (int32_t x = 0; x < size; ++x, weights += taps) {
        const Numbers *from = row + covers.first[x];
        Numbers sum = from[0] * weights[0];
        for (int32_t tap = 1; tap < taps; ++tap) sum += from[tap] * weights[tap];
        sums[x] = sum;
    }
}

void sum_row(const Numbers *row, mien::Covers covers, int32_t size, Numbers *sums) {
    switch (covers.taps) {
        case 3:
            return sum_row<3>(row, covers, size, sums);
        case 4:
            return sum_row<4>(row, covers, size, sums);
        default:
            return sum_row<0>(row, covers, size, sums);
    }
}

void write_row(const Numbers *means, int32_t size, uint8_t *to) {
    for (int32_t x = 0; x < size; ++x, to += kBytes) {
        const Numbers rounded = means[x] + kRounding;
        store<kBytes, 0, 1, 2>(to, reinterpret_cast<Pixel>(rounded) - kRoundingBits);
    }
}

}  // namespace

namespace mien {

void MIEN_SHRINK_FACE(const mien_shrink_job &job, Covers covers, float *room) {
    Numbers *row = reinterpret_cast<Numbers *>(room);
    Numbers *sums = row + job.edge + covers.taps, *means = sums + job.size;
    int32_t summed = -1;
    for (int32_t y = 0; y < job.size; ++y) {
        const float *weights = covers.weights + int64_t{y} * covers.taps;
        for (int32_t tap = 0; tap < covers.taps && (tap == 0 || weights[tap] != 0); ++tap) {
            const int32_t from = covers.first[y] + tap;
            // The last row of one mean may be the first of the next: it is summed once.
            if (from != summed) {
                read_row(job.picture + from * job.row_bytes, job.edge, row);
                sum_row(row, covers, job.size, sums);
                summed = from;
            }
            const float weight = weights[tap];
            if (tap == 0)
                for (int32_t x = 0; x < job.size; ++x) means[x] = sums[x] * weight;
            else
                for (int32_t x = 0; x < job.size; ++x) means[x] += sums[x] * weight;
        }
        write_row(means, job.size, job.smaller + int64_t{kBytes} * job.size * y);
    }
}

}  // namespace mien
