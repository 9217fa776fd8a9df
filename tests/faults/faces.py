"""Faces that are deleted, changed or added, between two runs and while one goes on.

The run goes on with what is usable and names what is not, or refuses in one line. Faces that were
decoded before are not looked at again, so what happens to their files then changes nothing.
"""

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
from course import COURSES, Cases, Workshop, newest, require
from disks import halts_or_goes_on
from trial import Sabotage, before, when

from mien.core.faces.png import read_header, write_face
from mien.core.faces.synthetic import draw_folder

FP32 = COURSES["fp32"]


def _delete(face: Path) -> None:
    face.unlink()


def _truncate(face: Path) -> None:
    content = face.read_bytes()
    face.write_bytes(content[: len(content) * 2 // 3])


def _flip_bits(face: Path) -> None:
    content = bytearray(face.read_bytes())
    for at in range(len(content) // 2, len(content) - 60, 97):
        content[at] ^= 0x10
    face.write_bytes(content)


def _change(face: Path) -> None:
    _, header = read_header(face)
    write_face(face, 255 - cv2.imread(str(face)), header)


def _resize(face: Path) -> None:
    edge_px, header = read_header(face)
    write_face(face, cv2.resize(cv2.imread(str(face)), (edge_px // 2, edge_px // 2)), header)


def _empty(face: Path) -> None:
    face.write_bytes(b"")


def _replace_by_folder(face: Path) -> None:
    face.unlink()
    face.mkdir()


def _add(face: Path) -> None:
    shutil.copyfile(face, face.with_name(f"0 {face.name}"))


def _add_a_stranger(face: Path) -> None:
    face.with_name("0 note.png").write_text("no picture")


def _delete_all_but_ten(face: Path) -> None:
    for other in sorted(face.parent.iterdir())[10:]:
        other.unlink()


def _delete_folder(face: Path) -> None:
    shutil.rmtree(face.parent)


CHANGES: tuple[Callable[[Path], None], ...] = (
    *(_delete, _truncate, _flip_bits, _change, _resize, _empty, _replace_by_folder, _add),
    *(_add_a_stranger, _delete_all_but_ten, _delete_folder),
)


MOMENTS = {
    "after the names were read": ("mien.core.faces.folder", "face_sources", 1),
    "after the headers were read": ("mien.core.data.sides", "hold_out", 1),
    "before decoding": ("mien.core.data.store", "_decode_into", 1),
    "while decoding": ("mien.core.data.decode", "decode_one", 9),
    "before the preview's faces": ("mien.core.preview.faces:PreviewLoader", "load", 1),
    "between the pictures and the masks of the preview": (
        "mien.core.preview.faces",
        "configured_masks",
        1,
    ),
}
"""Steps of a start: before the n-th call of which function."""


def between_runs(shop: Workshop, count: int, _seed: int) -> Cases:
    """What a second run on the same model makes of changed folders."""
    whole = shop.new_folder()
    outcome = shop.train(FP32, whole, until=2)
    require(outcome.code == 0, outcome.told)
    for change in CHANGES[:: max(len(CHANGES) // min(count, len(CHANGES)), 1)]:
        yield _name(change), functools.partial(_between, shop, whole, change)


def _between(shop: Workshop, whole: Path, change: Callable[[Path], None]) -> str:
    folder = shop.copy(whole)
    faces = shop.copy_of_faces("a", folder)
    face = sorted(faces.iterdir())[0]  # it is one of the preview's
    change(face)
    outcome = shop.train(FP32, folder, "-A", str(faces), until=4)
    seen = halts_or_goes_on(outcome)
    refuses = change in (_delete_all_but_ten, _delete_folder)
    require((outcome.code == 2) == refuses, f"exit code {outcome.code}: {outcome.told}")
    if change in (_truncate, _flip_bits, _empty):
        require(face.name in outcome.told, f"{face.name} is not named: {outcome.told}")
    last = newest(folder)
    require(last and last.iterations == (2 if refuses else 4), "saves are missing")
    return seen


def while_running(shop: Workshop, count: int, seed: int) -> Cases:
    """Changes during training, and at every step of the start."""
    choice = random.Random(seed)
    moments: dict[str, Callable[[Callable[[], None]], Sabotage]] = {
        "in training": lambda act: when("save", 3, act),
        **{moment: functools.partial(_before, place) for moment, place in MOMENTS.items()},
    }
    cases = [(moment, change) for moment in moments for change in CHANGES]
    if count < len(cases):
        cases = choice.sample(cases, 3 * count)
    for moment, change in cases:
        yield (
            f"{_name(change)} {moment}",
            functools.partial(_during, shop, moments[moment], change, moment == "in training"),
        )


def _before(place: tuple[str, str, int], act: Callable[[], None]) -> Sabotage:
    owner, name, number = place
    return before(owner, name, act, number)


def _during(
    shop: Workshop,
    at: Callable[[Callable[[], None]], Sabotage],
    change: Callable[[Path], None],
    is_training: bool,
) -> str:
    folder = shop.new_folder()
    faces = shop.copy_of_faces("a", folder)
    face = sorted(faces.iterdir())[0]
    outcome = shop.train(FP32, folder, "-A", str(faces), sabotage=at(lambda: change(face)))
    seen = halts_or_goes_on(outcome)
    if is_training:
        require(outcome.code == 0, f"exit code {outcome.code}: {outcome.told}")
        shop.compare(FP32, folder)
    # The faces come back: the next start must be as good as any.
    if outcome.code == 2:
        shutil.rmtree(faces, ignore_errors=True)
        draw_folder(faces, identity="a", count=len(list((shop.root / "a").iterdir())), size_px=96)
        again = shop.train(FP32, folder, "-A", str(faces))
        require(again.code == 0, f"the next start: {again.code}, {again.told}")
        shop.compare(FP32, folder)
    return seen


def _name(change: Callable[[Path], None]) -> str:
    return change.__name__.strip("_").replace("_", " ")
