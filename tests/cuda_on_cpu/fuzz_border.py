"""Every call of mien.h with jobs and memory that may hold anything: a child of test_border.py.

    fuzz_border.py LIBRARY DECLARATIONS CASES

A call returns a status, whatever it is given in memory of the sizes that mien.h states. The library
is built with sanitizers, which end the process at the first access or overflow that is wrong; so
memory comes from malloc, which they watch.
"""

import sys
from pathlib import Path

import cffi
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LIBRARY, DECLARATIONS, CASES = sys.argv[1:]

ffi = cffi.FFI()
ffi.cdef(Path(DECLARATIONS).read_text() + "void *malloc(size_t); void free(void *);")
lib, libc = ffi.dlopen(LIBRARY), ffi.dlopen(None)

SEEN = {}  # how often each call returned which status


def mostly(usual, odd):
    """Values that a call takes, as a rule, and now and then one that it may have to refuse."""
    return st.integers(0, 39).flatmap(lambda number: usual if number else odd)


def whole(low, high, *others):
    return mostly(st.integers(low, high), st.sampled_from(others))


INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
HUGE = (-(2**63), -1, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = st.floats(width=32)
TYPES = whole(0, 2, -1, 3, 2**31 - 1)


class Memory:
    """Memory of a call, each piece as long as it is asked for, to be freed together."""

    def __init__(self, data):
        self.data, self.pieces = data, []

    def piece(self, kind, num_bytes, fill=None):
        """A pointer to so many bytes of noise, or with what `fill` makes there; rarely none, or
        one that is not aligned."""
        odd = self.data.draw(mostly(st.just(""), st.sampled_from(["", "", "null", "off"])))
        if odd == "null":
            return ffi.NULL
        start = libc.malloc(num_bytes + 1)
        self.pieces.append(start)
        pointer = ffi.cast("char *", start) + (odd == "off")
        noise = self.data.draw(st.binary(min_size=1, max_size=64))
        ffi.memmove(pointer, (noise * (num_bytes // len(noise) + 1))[:num_bytes], num_bytes)
        if fill is not None and not odd:
            fill(ffi.cast(kind, pointer))
        return ffi.cast(kind, pointer)

    def free(self):
        for piece in self.pieces:
            libc.free(piece)


def calls(name, *args):
    status = getattr(lib, f"mien_{name}")(*args)
    SEEN[name, status] = SEEN.get((name, status), 0) + 1
    assert 0 <= status <= 4
    if status:
        assert ffi.string(lib.mien_last_error()), name


def fuzzed(test):
    """The test of so many cases, the same ones in every run."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options = {"max_examples": int(CASES), "deadline": None, "derandomize": True}
    return settings(suppress_health_check=slow, database=None, **options)(given(st.data())(test))


def struct(data, name, fields):
    """A new structure with these fields, all drawn."""
    drawn = {}
    for field, strategy in fields.items():
        drawn[field] = data.draw(strategy) if isinstance(strategy, st.SearchStrategy) else strategy
    return ffi.new(f"{name} *", drawn)


@fuzzed
def draws(data):
    memory = Memory(data)
    percents = ("zoom_percent", "rotation_degrees", "shift_percent", "flip_percent")
    percents += ("lightness_percent", "ab_percent", "clahe_chance_percent")
    some = mostly(st.floats(-1000, 1000, width=32), FLOATS)
    fields = dict.fromkeys(percents, some) | {"color": INT32, "flip": INT32}
    fields |= {"clahe_max_size": whole(0, 8, -1, 9), "warp": whole(0, 2, -1, 3)}
    ranges = struct(data, "mien_ranges", fields)
    numbers = st.lists(whole(1, 5, 0, 2**31 - 1, *HUGE), min_size=2, max_size=2)
    sides, count = data.draw(whole(1, 2, 0, 3, -1)), data.draw(whole(0, 40, *HUGE))
    rows = max(sides, 1) * count if 0 <= count <= 40 else 1
    fields = {"seed": st.integers(0, 2**64 - 1), "num_sides": sides, "count": count}
    fields |= {"num_faces": numbers, "size_px": whole(8, 4096, 0, 7, 4097, -1)}
    first = mostly(st.integers(0, 2**63 - 1), INT64)
    fields |= {"first": st.lists(first, min_size=2, max_size=2), "advance": whole(0, 99, *HUGE)}
    job = struct(data, "mien_draw_job", fields)
    job.params = memory.piece("mien_face *", rows * ffi.sizeof("mien_face"))
    if data.draw(st.booleans()):
        job.counters = memory.piece("int64_t *", max(sides, 1) * 8)
    calls("draw_cpu", ranges, job)
    calls("draw_cuda", ranges, job, ffi.NULL)
    memory.free()


def faces_like(data, job, count):
    """Fill parameters with some that a CPU takes, but for a few numbers."""
    firm = data.draw(st.integers(0, 3)) > 0  # else all of it stays noise

    def fill(faces):
        for row in range(count if firm else 0):
            face = faces[row]
            face.index, face.clahe_tiles = 0, row % 5
            face.warp = row % (3 if job.to_landmarks else 2)
            face.near = row % 10
            if data.draw(st.booleans()):
                face.matrix = [1, 0, 0, 0, 1, 0]
            fields = st.sampled_from(["index", "warp", "near", "clahe_tiles"])
            odd = data.draw(mostly(st.none(), fields))
            if odd is not None:
                setattr(face, odd, data.draw(INT32))

    return fill


@fuzzed
def augments(data):
    memory = Memory(data)
    size, sides = data.draw(whole(8, 24, 0, 7, 4097, -1)), data.draw(whole(1, 2, 0, 3))
    each = data.draw(st.integers(0, 2))
    count = data.draw(whole(each * max(sides, 1), each * max(sides, 1), *HUGE))
    outputs = data.draw(whole(1, 3, 0, 9, -1))
    edge = whole(1, size if 8 <= size <= 24 else 1, 0, -1, 4097)
    fields = {"count": count, "num_sides": sides, "size_px": size, "num_outputs": outputs}
    fields |= {"num_faces": st.lists(whole(1, 3, *HUGE), min_size=2, max_size=2)}
    fields |= {"gathered": whole(0, 1, 7), "rgb": INT32, "input_px": edge}
    fields |= {"input_channels": mostly(st.sampled_from([3, 8]), INT32)}
    fields |= {"input_type": TYPES, "target_type": TYPES, "penalize": INT32}
    fields |= {"output_px": st.lists(edge, min_size=8, max_size=8)}
    fields |= {"to_landmarks": whole(0, 1, 7), "single_interpolation": INT32}
    fields |= {"eye_extra": FLOATS, "mouth_extra": FLOATS}
    job = struct(data, "mien_augment_job", fields)
    rows = count if 0 <= count <= 8 else 0
    for side in range(2):
        in_store = job.num_faces[side] if 1 <= job.num_faces[side] <= 3 else 0
        faces = rows if job.gathered else in_store
        pixels = size * size if 8 <= size <= 24 else 0
        job.faces[side] = memory.piece("uint8_t *", faces * pixels * 8)
        job.landmarks[side] = memory.piece("float *", in_store * lib.MIEN_LANDMARKS * 8)
        nearest = memory.piece("int32_t *", in_store * lib.MIEN_NEAREST * 4, near_ones(in_store))
        job.nearest[side] = nearest
    face_bytes = ffi.sizeof("mien_face")
    job.params = memory.piece("mien_face *", rows * face_bytes, faces_like(data, job, rows))
    small = [edge for edge in (job.input_px, *job.output_px) if 1 <= edge <= 24]
    pixels = rows * max(small, default=0) ** 2  # of any of them, so that all have room
    job.input = memory.piece("void *", pixels * 8 * 4)
    for i in range(8):
        job.targets[i] = memory.piece("void *", pixels * 3 * 4)
        job.weights[i] = memory.piece("float *", pixels * 4)
    if data.draw(st.booleans()):
        job.mask = memory.piece("float *", pixels * 4)
    assert 0 <= lib.mien_augment_launches(job) <= 9
    calls("augment_cpu", job, data.draw(st.one_of(st.integers(0, 3), INT32)))
    needed = lib.mien_augment_workspace_bytes(job)
    given = needed - data.draw(whole(0, 0, 1)) if needed < 2**24 else 0
    calls("augment_cuda", job, memory.piece("void *", max(given, 0)), given, ffi.NULL)
    memory.free()


def near_ones(count):
    """Numbers of faces that are there: noise seldom names one."""

    def fill(nearest):
        for i in range(0, count * lib.MIEN_NEAREST, 2):
            nearest[i] = 0

    return fill


@fuzzed
def face_losses(data):
    memory = Memory(data)
    batch = data.draw(whole(1, 2, 0, *HUGE))
    edge = whole(1, 40, 0, -1, 65537, 2**31 - 1)
    fields = {"batch": batch, "height": edge, "width": edge, "num_losses": whole(1, 8, 0, 9, -1)}
    fields |= {"channels": mostly(st.sampled_from([1, 3]), INT32)}
    fields |= {"pred_type": TYPES, "target_type": TYPES}
    fields |= {"kinds": st.lists(whole(0, 4, -1, 5), min_size=8, max_size=8)}
    fields |= {"shares": st.lists(FLOATS, min_size=8, max_size=8)}
    job = struct(data, "mien_face_loss_job", fields)
    sizes = (batch, job.height, job.width)
    fits = batch <= 2 and all(1 <= number <= 40 for number in sizes)
    pixels = batch * job.height * job.width if fits else 0
    for side in range(2):
        job.preds[side] = memory.piece("void *", pixels * 3 * 4)
        job.gradients[side] = memory.piece("void *", pixels * 3 * 4)
    job.target = memory.piece("void *", 2 * pixels * 3 * 4)
    job.means = memory.piece("float *", 2 * 8 * 4)
    if data.draw(st.booleans()):
        job.weight = memory.piece("float *", 2 * pixels * 4)
    if data.draw(st.booleans()):
        job.scale = memory.piece("float *", 4)
    needed = lib.mien_face_loss_workspace_bytes(job)
    given = needed - data.draw(whole(0, 0, 1)) if needed < 2**24 else 0
    room = memory.piece("void *", max(given, 0)), given
    calls("face_loss_cpu", job, *room, data.draw(st.one_of(st.integers(0, 3), INT32)))
    calls("face_loss_cuda", job, *room, ffi.NULL)
    memory.free()


def filters_of(data, kind, size):
    """Filters that a loss takes for pictures of this edge, but for a few numbers."""
    size = size if 1 <= size <= 40 else 1
    blurs, steps = [(2, 0), (4, 0), (5, 5), (5, 4)][kind if 0 <= kind <= 3 else 0]
    sizes = [max(1, size >> level) for level in range(6)]
    shapes = [(sizes[level if steps else 0],) * 2 for level in range(blurs)]
    shapes += [(sizes[step + 1], sizes[step]) for step in range(steps)]
    shapes += [(size, sizes[step + 1]) for step in range(steps)]
    filters = []
    for rows, columns in shapes:
        filter = [rows, columns]
        filter += [data.draw(st.integers(1, most)) for most in (columns, rows)]
        odd = data.draw(mostly(st.none(), st.integers(0, 3)))
        if odd is not None:
            filter[odd] = data.draw(INT32)
        filters.append(filter)
    return filters


@fuzzed
def filtered_losses(data):
    memory = Memory(data)
    kind, size = data.draw(whole(0, 3, -1, 4)), data.draw(whole(1, 40, 0, -1, 4097, 2**31 - 1))
    filters = filters_of(data, kind, size)
    fields = {"kind": kind, "size": size, "faces": whole(1, 2, 0, *HUGE), "filters": filters}
    fields |= {"channels": whole(1, 4, 0, -1, 5), "num_teams": mostly(st.just(8), INT32)}
    fields |= {"num_filters": whole(len(filters), len(filters), 0, 15, 16, -1)}
    job = struct(data, "mien_filtered_loss_job", fields)
    fits = 1 <= job.faces <= 2 and 1 <= size <= 40 and 1 <= job.channels <= 4
    pixels = job.faces * size * size if fits else 0
    for name in ("pred", "target", "gradient"):
        setattr(job, name, memory.piece("float *", pixels * 4 * 4))
    job.weight = memory.piece("float *", pixels * 4)
    job.values = memory.piece("float *", 2 * 4 * 4)
    used = [each for each in filters if all(1 <= number <= 40 for number in each)]
    job.firsts = memory.piece("int32_t *", sum(each[0] + each[1] for each in used) * 4)
    taps = sum(each[0] * each[2] + each[1] * each[3] for each in used)
    job.taps = memory.piece("float *", taps * 4)
    needed = lib.mien_filtered_loss_workspace_bytes(job)
    given = needed - data.draw(whole(0, 0, 1)) if needed < 2**24 else 0
    room = memory.piece("void *", max(given, 0)), given
    calls("filtered_loss_cpu", job, *room)
    calls("filtered_loss_cuda", job, *room, ffi.NULL)
    memory.free()


draws()
augments()
face_losses()
filtered_losses()
for (name, status), number in sorted(SEEN.items()):
    print(name, status, number)
