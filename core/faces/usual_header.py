"""The header of a face PNG by libmien: its landmarks and version, without Python's lock.

It understands what extraction writes, and has no reasons for what it does not. So whatever it
leaves, `core.faces.png` reads or refuses; what it does read is what that would read.
"""

import math

import numpy as np

from ...kernels import native


def read_usual(text: bytes) -> tuple[np.ndarray, float | None] | None:
    """Landmarks and alignments version of a header, None where it has another form.

    Args:
        text: The Python literal, UTF-8.

    Returns:
        (68, 2) float32, px of the source frame, which are a face's; and the version, None where
        the text tells none.
    """
    ffi, lib = native.library()
    landmarks_l2 = np.empty((lib.MIEN_LANDMARKS, 2), np.float32)
    job = ffi.new(
        "mien_face_header_job *",
        {
            "text": ffi.from_buffer(text),
            "landmarks": ffi.from_buffer("float[]", landmarks_l2),
            "num_bytes": len(text),
        },
    )
    native.call("face_header_cpu", job)
    if not job.is_usual:
        return None
    return landmarks_l2, None if math.isnan(job.version) else job.version
