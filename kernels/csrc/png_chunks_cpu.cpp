// The chunks of a PNG: their checksums compared, and the picture's deflated data put together.
#include <string.h>

#include "crc32.h"
#include "status.h"

namespace {

constexpr int64_t kFraming = 12;  // length, kind and checksum of a chunk
constexpr int64_t kHeaderBytes = 13;
constexpr uint8_t kSignature[8] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n'};
// Depth and colours, and the only ways to deflate, to filter and to order rows.
constexpr uint8_t kRgb8[5] = {8, 2, 0, 0, 0};
// What does not change how the pixels are read.
constexpr char kTexts[][5] = {"iTXt", "tEXt", "zTXt", "tIME", "pHYs", "gAMA", "sRGB", "cHRM"};

uint32_t number_at(const uint8_t *at) {
    return uint32_t{at[0]} << 24 | uint32_t{at[1]} << 16 | uint32_t{at[2]} << 8 | at[3];
}

bool is_kind(const uint8_t *kind, const char *name) { return memcmp(kind, name, 4) == 0; }

bool is_text(const uint8_t *kind) {
    for (const char *name : kTexts)
        if (is_kind(kind, name)) return true;
    return false;
}

bool read_header(const uint8_t *data, mien_png_chunks_job &job) {
    const uint32_t columns = number_at(data), rows = number_at(data + 4);
    if (columns < 1 || columns > MIEN_MAX_PNG_PX || rows < 1 || rows > MIEN_MAX_PNG_PX)
        return false;
    job.columns = static_cast<int32_t>(columns);
    job.rows = static_cast<int32_t>(rows);
    return memcmp(data + 8, kRgb8, sizeof kRgb8) == 0;
}

bool read_chunks(mien_png_chunks_job &job) {
    if (job.num_bytes < 8 || memcmp(job.png, kSignature, sizeof kSignature)) return false;
    enum { kStart, kHeader, kData, kBehind } part = kStart;
    for (int64_t at = 8; job.num_bytes - at >= kFraming;) {
        const int64_t length = number_at(job.png + at);
        const uint8_t *kind = job.png + at + 4, *data = kind + 4;
        if (length > job.num_bytes - at - kFraming) return false;
        at += kFraming + length;
        if (is_text(kind)) {
            if (part == kStart) return false;
            if (part == kData) part = kBehind;
            continue;
        }
        if (mien::crc32(kind, 4 + length) != number_at(data + length)) return false;
        if (is_kind(kind, "IHDR")) {
            if (part != kStart || length != kHeaderBytes || !read_header(data, job)) return false;
            part = kHeader;
        } else if (is_kind(kind, "IDAT")) {
            // Data that something parts is for others to judge.
            if (part != kHeader && part != kData) return false;
            memcpy(job.deflated + job.num_deflated, data, length);
            job.num_deflated += length;
            part = kData;
        } else {
            return is_kind(kind, "IEND") && part >= kData;
        }
    }
    return false;
}

}  // namespace

mien_status mien_png_chunks_cpu(mien_png_chunks_job *job) {
    if (!job || !job->png || !job->deflated)
        return mien::fail(MIEN_INVALID_ARGUMENT, "null pointer");
    if (job->num_bytes < 0)
        return mien::fail(MIEN_INVALID_ARGUMENT, "num_bytes must be at least 0, got %lld",
                          static_cast<long long>(job->num_bytes));
    job->num_deflated = 0;
    job->is_plain = read_chunks(*job);
    return MIEN_OK;
}
