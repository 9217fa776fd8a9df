"""How widths and sizes run from one end of a network to the other. Whole numbers in, out."""


def curve(first: int, last: int, count: int, slope: float) -> tuple[int, ...]:
    """``count`` numbers from first to last, rounded down to multiples of 8; one alone is first.

    With t = 0..1 along the way and s = slope, the share that is done of it is
    ``(t - t s) / (s - 2 s t + 1)``: a straight line where s is 0, late where s is above.
    """
    # At 1 and -1 all of the way would be done at one end.
    slope = min(max(slope, -0.99), 0.99)
    values = []
    for number in range(count):
        t = number / (count - 1) if count > 1 else 0.0
        share = (t - t * slope) / (slope - 2 * slope * t + 1)
        values.append(int((share * (last - first) + first) // 8 * 8))
    return tuple(values)


def capped(first: int, last: int, count: int, slope: float, *, at_end: bool) -> tuple[int, ...]:
    """``count`` numbers that fall from first by a fixed share each, to ``last`` and no lower.

    What is missing then is filled with ``last`` at the end, or with ``first`` at the beginning.
    """
    values = [first]
    while values[-1] != last and len(values) < count:
        values.append(max(last, int(values[-1] * (1 - abs(slope)) // 8 * 8)))
    missing = count - len(values)
    filled = [*values, *[last] * missing] if at_end else [*[first] * missing, *values]
    return tuple(filled[:count])


def halvings(size_px: int, limit_px: int) -> tuple[int, ...]:
    """The size halved again and again, until it is within the limit or odd; the size first."""
    halved = [size_px]
    while halved[-1] > limit_px and halved[-1] % 2 == 0:
        halved.append(halved[-1] // 2)
    return tuple(halved)
