"""Places in tensors that hold unlike things side by side: each such layout is one `Places`."""

from enum import IntEnum


class Places(IntEnum):
    """Names of places, numbered from 0 in the order in which they are declared.

    A kernel takes a place as a constant, ``tl.constexpr(Scalar.STEP)``: Triton reads no other
    globals, and compiles anew when the value of one has changed.
    """

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last_values: list[int]) -> int:
        return count
