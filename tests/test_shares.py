"""Several folders of a side: shares of the draws, what is refused, batches that stay the same."""

import json
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from mien.cli import main
from mien.core.config import DataConfig, EvaluateConfig, from_dict
from mien.core.data.feed import Feed
from mien.core.data.shares import DrawTable, Source, shares_of, sources_of
from mien.core.data.sides import open_sides
from mien.kernels.draw import FACE_PARAMS, params_from_records, records_of


@pytest.fixture(scope="module")
def folders(sides, tmp_path_factory) -> dict[str, Path]:
    """Folders of one side: whole, or its faces in two folders; and of the same names twice."""
    place = tmp_path_factory.mktemp("shares")
    found = {"whole": sides[0], "b": sides[1]}
    for number, file in enumerate(sorted(sides[0].glob("*.png"))):
        name = "one" if number % 2 else "two"
        found[name] = place / name
        found[name].mkdir(exist_ok=True)
        shutil.copy2(file, found[name])
    found["copy"] = place / "copy"
    shutil.copytree(found["two"], found["copy"])
    shutil.copytree(found["two"], place / "tree" / "left" / "deep")
    shutil.copytree(found["one"], place / "tree" / "right")
    found["tree"] = place / "tree"
    return found


def opened(input_a, folders, store_dir=None, **data):
    config = DataConfig(input_a=input_a, input_b=str(folders["b"]), num_threads=1, **data)
    cpu = torch.device("cpu")
    return open_sides(config, EvaluateConfig(), 16, store_dir=store_dir, device=cpu)


def feed_of(faces, offset=0, count=6):
    return Feed(
        {side: each.store for side, each in faces.items()},
        from_dict({"train": {"batch_size": 6}}),
        input_px=16,
        output_px=(16,),
        device=torch.device("cpu"),
        dtype=torch.float32,
        num_threads=1,
        offset=offset,
        count=count,
        tables={side: each.draw_table for side, each in faces.items()},
    )


def drawn(table: DrawTable, begin: int, count: int) -> np.ndarray:
    """Faces of the draws from ``begin`` on, each slot of a round once, in order."""
    records = np.zeros(count, FACE_PARAMS)
    records["index"] = (begin + np.arange(count)) % table.num_slots
    params_nx = params_from_records(records)
    table.choose(params_nx, begin)
    return records_of(params_nx)["index"]


def test_faces_of_several_folders_are_those_of_one_that_holds_them_all(folders, tmp_path):
    """Sub-folders too; and the second start finds them decoded."""
    both = [str(folders["one"]), str(folders["two"])]
    whole = opened(str(folders["whole"]), folders)["a"]
    for input_a, sub_folders in ((both, False), (str(folders["tree"]), True)):
        for is_second in (False, True):
            faces = opened(input_a, folders, tmp_path, sub_folders=sub_folders)
            assert faces["a"].store.reused is is_second
            assert torch.equal(faces["a"].store.faces_fssc, whole.store.faces_fssc)
            assert faces["a"].draw_table is None
    assert faces["a"].store.names[0].startswith("left/deep/")


def test_files_of_one_name_in_two_folders_are_two_faces(folders):
    faces = opened([str(folders["two"]), f"{folders['copy']}:0.25"], folders)["a"]
    assert faces.store.num_faces == len(set(faces.store.names)) == 26
    assert faces.described == (
        f"13 of {folders['two']} (75.0% of draws), 13 of {folders['copy']} (25.0% of draws)"
    )
    assert len(faces.landmarks_fl2) == 26


@pytest.mark.parametrize(
    ("shares", "counts", "expected"),
    [
        ([None, 0.3], [70, 5], [0.7, 0.3]),
        ([0.2, None, None], [9, 30, 10], [0.2, 0.6, 0.2]),
        ([2, 1, 1], [9, 9, 9], [0.5, 0.25, 0.25]),
    ],
)
def test_draws_keep_the_shares_and_come_to_each_face_of_a_folder_equally(shares, counts, expected):
    found = shares_of([Source("x", share) for share in shares], counts)
    np.testing.assert_allclose(found, expected)
    folder_f = np.repeat(np.arange(len(counts)), counts)
    table = DrawTable(folder_f, [f"{i}.png" for i in range(sum(counts))], found)
    num_rounds = 7
    faces = drawn(table, 0, num_rounds * table.num_slots)
    times_f = np.bincount(faces, minlength=sum(counts))
    for number, share in enumerate(expected):
        of_folder = times_f[folder_f == number]
        assert abs(of_folder.sum() - share * len(faces)) <= num_rounds
        assert of_folder.max() - of_folder.min() <= 1
    # Of serial numbers alone, whatever was drawn before.
    np.testing.assert_array_equal(drawn(table, 4321, 50), faces[4321:4371])


def test_batches_with_shares_are_alike_alone_by_ranks_and_from_a_count_on_the_device(folders):
    faces = opened([str(folders["one"]), f"{folders['two']}:0.9"], folders)
    whole, parts = feed_of(faces), [feed_of(faces, 0, 4), feed_of(faces, 4, 2)]
    for seen in ({"a": 0, "b": 0}, {"a": 60006, "b": 60006}):
        batch = whole.next(seen)
        halves = [part.next(seen) for part in parts]
        for side in range(2):
            joined = torch.cat([half.input_nchw.chunk(2)[side] for half in halves])
            assert torch.equal(joined, batch.input_nchw.chunk(2)[side])
        whole.seek(seen)
        assert torch.equal(whole.batch().input_nchw, batch.input_nchw)
    for feed in (whole, *parts):
        feed.close()


def test_what_does_not_go_together_is_refused_in_one_line(folders, tmp_path):
    one, two, whole = (str(folders[name]) for name in ("one", "two", "whole"))
    link = tmp_path / "link"
    link.symlink_to(one)
    for texts, words in {
        (one, f"{link}:0.5"): "both use the folder",
        (one, f"{two}:1"): "has no share, and those of the other folders make 1",
        (one, f"{two}:0"): "must be at least 0.001 of all, got 0",
        (one, f"{two}:1e9"): "two: the share .* must be a number such as 0.3, got '1e9'",
        (f"{one}:{'9' * 400}", f"{two}:1"): "one: the share .* must be a number such as 0.3, got",
        (one, f"{two}x:0.5"): "twox does not exist",
        (one, str(folders["b"])): "give each side a folder of its own",
    }.items():
        with pytest.raises(ValueError, match=words) as refusal:
            opened(list(texts), folders)
        assert "\n" not in str(refusal.value)
    none = tmp_path / "none"
    none.mkdir()
    (none / "0.png").write_bytes(b"none")
    with pytest.raises(ValueError, match="none has a share of the draws, but no face of it is"):
        opened([whole, f"{none}:0.5"], folders)
    tree = str(folders["tree"])
    with pytest.raises(ValueError, match="left/deep, right hold 26: .* add --sub-folders"):
        opened(tree, folders)
    with pytest.raises(ValueError, match="share 13 files: give each face once"):
        opened([tree, f"{tree}/right"], folders, sub_folders=True)
    assert sources_of([whole], side="a", sub_folders=False) == [Source(whole, None)]
    small = sources_of([f"{one}:0.0001", f"{two}:0.0003"], side="a", sub_folders=False)
    assert shares_of(small, [13, 13]) == pytest.approx([0.25, 0.75]), "of their sum"


def test_a_path_with_a_colon_that_exists_is_one(folders, tmp_path):
    place = tmp_path / "set:0.5"
    shutil.copytree(folders["whole"], place)
    assert opened(str(place), folders)["a"].folder.path == place
    assert opened(f"{place}:0.5", folders)["a"].folder.path == place


def test_flags_and_files_take_several_folders(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.toml"
    file.write_text('[data]\ninput_a = "mine and yours"\ninput_b = ["one", "two:0.3"]\n')
    flags = ["-A", "one", "--input-a", "two:0.3", "--sub-folders"]
    for words, side in ((flags, "a"), (["-C", str(file)], "b")):
        assert main(["train", *words, "--print-config"]) == 0
        data = tomllib.loads(capsys.readouterr().out)["data"]
        assert data[f"input_{side}"] == [f"{tmp_path}/one", f"{tmp_path}/two:0.3"]
        assert data["sub_folders"] is (side == "a")
    assert data["input_a"] == [f"{tmp_path}/mine and yours"]
    assert main(["train", "--set", "data.input_a=5", "--print-config"]) == 2
    assert "data.input_a must be a path, or a list of paths, got 5" in capsys.readouterr().err


def test_faces_of_sub_folders_are_checked_and_moved_on_request(folders, tmp_path, capsys):
    tree = tmp_path / "tree"
    shutil.copytree(folders["tree"], tree)
    bad = tree / "left" / "deep" / "bad.png"
    bad.write_bytes(b"none")
    words = ["faces", "check", str(tree)]
    assert main(words) == 2
    assert "add --sub-folders" in capsys.readouterr().err
    assert main([*words, "--sub-folders", "--json", "--move-to", str(tmp_path / "aside")]) == 0
    (found,) = json.loads(capsys.readouterr().out)["folders"]
    assert found["num_faces"] == 26
    assert list(found["unreadable"]) == ["left/deep/bad.png"]
    assert (tmp_path / "aside" / "unusable" / "left" / "deep" / "bad.png").exists()
    assert not bad.exists()
