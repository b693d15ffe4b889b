"""Labelled pictures in every layout, what is refused, and which class is which."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT
from labelled import cifar_binary, cifar_python, colours, idx, mnist
from parallel_parnet import ParNetError
from parallel_parnet.commands.data import mnist as mnist_layout
from parallel_parnet.commands.data.classes import match
from parallel_parnet.commands.data.finding import open_split
from parallel_parnet.commands.data.split import TEST, TRAIN, VAL, Split
from parallel_parnet.commands.train.made_up import draw

PICTURE = next((ROOT / "launch" / "demo" / "pictures").glob("*.png"))


def pixels(split: Split, i: int) -> np.ndarray:
    return np.asarray(split.open(i))


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(packed: bool, tmp_path: Path) -> None:
    folder = mnist(tmp_path / "data", 12, 7, packed)
    split = open_split(folder, TEST)
    assert (len(split), split.classes, split.count, split.name(3)) == (7, (), 7, "t10k/00003")
    assert split.truth.tolist() == list(range(7)) and pixels(split, 3)[6:12].min() >= 150
    assert len(open_split(folder, TRAIN)) == 12


def test_both_forms_of_cifar_hold_the_same(tmp_path: Path) -> None:
    binary = cifar_binary(tmp_path / "binary")
    python = cifar_python(tmp_path / "python", binary)
    for part, count in ((TRAIN, 10), (TEST, 2)):
        a, b = open_split(binary, part), open_split(python, part)
        assert len(a) == count and a.truth.tolist() == b.truth.tolist() and a.classes == b.classes != ()
        assert all(np.array_equal(pixels(a, i), pixels(b, i)) for i in range(count))
        assert len({a.name(i) for i in range(count)}) == count
    record = (binary / "test_batch.bin").read_bytes()[1:3073]
    planes = np.frombuffer(record, np.uint8).reshape(3, 32, 32)
    assert np.array_equal(pixels(open_split(binary, TEST), 0)[:, :, 2], planes[2])


def test_cifar_100_takes_the_fine_labels(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.bin").write_bytes(bytes([3, 77]) + bytes(3072))
    split = open_split(tmp_path, TRAIN)
    assert split.truth.tolist() == [77] and split.layout.startswith("CIFAR-100")


def test_folders(tmp_path: Path) -> None:
    draw(tmp_path, {"train": 2, "val": 1})
    assert len(open_split(tmp_path, TRAIN)) == 6
    split = open_split(tmp_path, TEST)
    assert split.classes == ("disc", "square", "triangle") and split.name(1) == os.path.join("square", "000.png")
    assert open_split(tmp_path / "val", TEST).truth.tolist() == split.truth.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_the_part_that_was_asked_for(name: str, tmp_path: Path) -> None:
    """Or what stands for it where it is missing; it says which it is."""
    colours(tmp_path, {"train": 1, name: 2})
    assert [open_split(tmp_path, part).part for part in (TRAIN, VAL, TEST)] == ["train", name, name]
    colours(tmp_path, {"test": 3})
    counts = [(split.part, len(split)) for split in (open_split(tmp_path, part) for part in (TRAIN, VAL, TEST))]
    assert counts == [("train", 3), (name, 6), ("test", 9)]
    assert open_split(tmp_path, VAL).told(tmp_path) == f"6 pictures of {tmp_path}, split {name}"
    assert open_split(tmp_path / "test", TEST).told(tmp_path) == f"9 pictures of {tmp_path}"
    shutil.rmtree(tmp_path / name)
    assert open_split(tmp_path, VAL).part == "test"
    shutil.copytree(tmp_path / "train" / "red", tmp_path / name)
    with pytest.raises(ParNetError, match=f"{name}: has no folder per class; put the pictures of each class into one"):
        open_split(tmp_path, VAL)


def test_what_is_passed_over_is_counted_and_links_are_followed(tmp_path: Path) -> None:
    """Links that go round in circles too, once."""
    place = colours(tmp_path, {"val": 2}) / "val" / "red"
    more, picture = tmp_path / "more", place / "000.png"
    shutil.copytree(place, more)
    for link, to in ((place / "linked", more), (more / "back", place), (more / "up", tmp_path / "val")):
        link.symlink_to(to)
    assert not open_split(tmp_path, VAL).left_out
    for path in (place / "a.heic", more / "b.JP2", tmp_path / "val" / "c.svg", place / "README", place / ".hidden"):
        shutil.copy(picture, path)
    split = open_split(tmp_path, VAL)
    red = [split.name(i) for i in range(len(split)) if split.truth[i] == split.classes.index("red")]
    assert red == ["red/000.png", "red/001.png", "red/linked/000.png", "red/linked/001.png"]
    assert split.left_out == "4 file(s) passed over (.heic, .jp2, .svg, no suffix)"
    assert split.told(tmp_path).endswith(f"split val; {split.left_out}")


def test_folders_in_folders_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All count but hidden ones; one that cannot be read is no reason to go on with fewer pictures."""
    draw(tmp_path, {"val": 1})
    for name in ("more", ".thumbnails"):
        shutil.copytree(tmp_path / "val" / "disc", tmp_path / "val" / "square" / name)
    split = open_split(tmp_path, TEST)
    names = ["disc/000.png", "square/000.png", "square/more/000.png", "triangle/000.png"]
    assert [split.name(i) for i in range(len(split))] == names
    scan = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "more":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ParNetError, match=r"square/more: cannot be read \(Permission denied\)"):
        open_split(tmp_path, TEST)


def batch(*labels: int) -> dict[str, object]:
    return {"data": np.zeros((len(labels), 3072), np.uint8), "labels": list(labels)}


class Command:
    def __reduce__(self) -> tuple:
        return os.system, ("touch was-run",)


class Zeros:
    """An array of a number of bytes, where these should be."""

    def __reduce__(self) -> tuple:
        return np.zeros(1, np.uint8).__reduce_ex__(5)[0], (10**12, np.dtype(np.uint8), (1, 3072), "C")


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Command(), "names posix.system, which loading could run"),
        ({"data": np.zeros(3)}, "not of bytes"),
        ({"data": np.zeros((2, 3072), np.uint8, "F"), "labels": [1, 2]}, "not of bytes, row by row"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, "are not 3072 values for each of 1"),
        ({"data": 1}, "holds no labels"),
        (batch(3, 2**70), "the label of picture 1 is none of 0 to 9"),
        (batch(-1, 12), "the label of picture 0 is none of 0 to 9"),
        ([1], "holds no dictionary"),
        ({"data": Zeros(), "labels": [1]}, "truncated, or no pickle"),
    ],
    ids=["command", "floats", "by columns", "shape", "labels", "beyond 64 bits", "negative", "list", "zeros"],
)
def test_a_pickle_is_read_and_never_run(content: object, says: str, protocol: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(ParNetError, match=says):
        open_split(tmp_path, TEST)
    assert not Path("was-run").exists()


@pytest.mark.parametrize(
    "content", [b"\x80\x02r\xff\xff\xff\xff.", b"", pickle.dumps(batch(1), 5).replace(b"_frombuffer", b"_frombuffe")]
)
def test_what_is_no_pickle(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ParNetError, match="truncated, or no pickle"):
        open_split(tmp_path, TEST)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("writable", [True, False])
def test_what_other_pythons_write(protocol: int, writable: bool, tmp_path: Path) -> None:
    drawn = np.random.default_rng(protocol).integers(0, 256, (3, 3072), np.uint8)
    drawn.flags.writeable = writable
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": drawn, "labels": [1, 0, 9]}, protocol))
    split = open_split(tmp_path, TEST)
    assert split.truth.tolist() == [1, 0, 9]
    assert all(np.array_equal(pixels(split, i), drawn[i].reshape(3, 32, 32).transpose(1, 2, 0)) for i in range(3))


def test_a_batch_that_was_cut_anywhere(tmp_path: Path) -> None:
    binary = cifar_binary(tmp_path / "binary")
    python = cifar_python(tmp_path / "python", binary)
    for path in (python / "test_batch", binary / "test_batch.bin"):
        whole = path.read_bytes()
        for end in (0, 1, 900, len(whole) // 2 + 1, len(whole) - 1):
            path.write_bytes(whole[:end])
            with pytest.raises(ParNetError, match="truncated"):
                open_split(path.parent, TEST)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(idx(np.zeros((2, 28, 28), np.uint8)))[:-9], "cannot be read as an IDX file"),
        (gzip.compress(idx(np.zeros((2, 28, 28), np.uint8))[:-9]), "truncated, or longer"),
        (gzip.compress(bytes([0, 0, 8, 3]) + b"\x7f" * 12), "at most"),
        (gzip.compress(b"no idx file"), "not an IDX file of bytes"),
        (gzip.compress(bytes([0, 0, 8, 65]) + b"\0\0\0\1" * 65 + b"\0"), "cannot be read as an IDX file"),
        (b"no gzip", "cannot be read as an IDX file"),
    ],
    ids=["cut", "cut before", "huge", "foreign", "65 dimensions", "not packed"],
)
def test_a_damaged_idx_file(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ParNetError, match=says):
        mnist_layout.read_idx(path)


def test_idx_pictures_without_pixels(tmp_path: Path) -> None:
    for kind, shape in (("images-idx3-ubyte", (2, 0, 28)), ("labels-idx1-ubyte", (2,))):
        (tmp_path / f"t10k-{kind}").write_bytes(idx(np.zeros(shape, np.uint8)))
    with pytest.raises(ParNetError, match=r"t10k has pictures \(2, 0, 28\) but labels \(2,\)"):
        open_split(tmp_path, TEST)


def test_folders_that_cannot_be_right(tmp_path: Path) -> None:
    with pytest.raises(ParNetError, match="no such folder"):
        open_split(tmp_path / "none", TEST)
    with pytest.raises(ParNetError, match="neither a folder per class, nor MNIST's files"):
        open_split(tmp_path, TEST)
    (tmp_path / "a").mkdir()
    with pytest.raises(ParNetError, match="a: no pictures in the folder of this class"):
        open_split(tmp_path, TEST)
    with pytest.raises(ParNetError, match="put the folders of classes into train/"):
        open_split(tmp_path, TRAIN)
    draw(tmp_path / "only", {"train": 1})
    with pytest.raises(ParNetError, match="no test/ or val/ or valid/ or validation/ beside train/"):
        open_split(tmp_path / "only", TEST)
    draw(tmp_path / "only", {"val": 1})
    mnist(tmp_path / "half", 1, 1)
    (tmp_path / "half" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ParNetError, match=r"train-labels-idx1-ubyte\.gz: cannot be read"):
        open_split(tmp_path / "half", TRAIN)


def named(*classes: str, ordered: bool = False, layout: str = "folders") -> Split:
    return Split(layout, "", np.arange(max(1, len(classes))), classes, ordered, str, lambda i: None)  # type: ignore[arg-type,return-value]


def test_which_class_is_which() -> None:
    by_name = match(named("a", "b", "T-shirt-top"), ("T-shirt/top", "a", "b"), 3)
    assert by_name.numbers.tolist() == [1, 2, 0] and not by_name.words
    assert "'c' in folders is none" in match(named("a", "c"), ("a", "b"), 2).words
    assert "'b' of the network's 2 classes is missing" in match(named("a"), ("a", "b"), 2).words
    assert "same name" in match(named("a", "b"), ("b", "a", "a"), 3).words
    # without names in the network, folders are matched only where their names say how
    assert match(named("0", "10", "2", *"13456789"), (), 11).numbers.tolist()[:3] == [0, 10, 2]
    assert match(named("n00000001", "n00000002"), (), 2).numbers.tolist() == [0, 1]
    assert "nobody knows which is which" in match(named("cat", "dog"), (), 2).words
    assert "2 classes in folders, and 10 in the network" in match(named("cat", "dog"), (), 10).words
    assert match(named("cat", "dog", ordered=True), (), 2).numbers.tolist() == [0, 1]
    # a layout without names has numbers only, which must not exceed the network's
    numbers = replace(named(), truth=np.asarray([0, 4]))
    assert "no names of classes" in match(numbers, ("a",) * 5, 5).words
    assert match(numbers, (), 4).numbers is None


def test_names_for_a_layout_that_has_none() -> None:
    numbers = replace(named(), truth=np.asarray([0, 2]))
    assert numbers.named(("a", "b", "c")).classes == ("a", "b", "c")
    assert numbers.digest != replace(numbers, truth=np.asarray([2, 0])).digest, "of other classes"
    with pytest.raises(ParNetError, match="2 names, but class 2 occurs"):
        numbers.named(("a", "b"))
    with pytest.raises(ParNetError, match="names its classes itself"):
        named("a").named(("b",))
