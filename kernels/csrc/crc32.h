// The checksum of a PNG's chunks.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace mien {

// CRC-32 of ISO 3309, as PNG has it: polynomial 0x04c11db7, bits in reverse.
uint32_t crc32(const uint8_t *data, size_t num_bytes);

}  // namespace mien
