#pragma once
#include "mien.h"

namespace mien {
// Record why a call failed (printf style) and hand its status back to the caller.
mien_status fail(mien_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
}  // namespace mien
