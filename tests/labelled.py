"""Small folders of labelled pictures, in each layout, made up."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from parallel_parnet.commands.data.cifar import FIVE, PIXELS


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape) + values.tobytes()


def mnist(folder: Path, train: int, test: int, packed: bool = True) -> Path:
    """Grey pictures whose brighter row tells the class, ten of them."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = random.integers(0, 80, (count, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 6] += 150
        for kind, values in (("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)):
            content = idx(values)
            name = f"{prefix}-{kind}" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content) if packed else content)
    return folder


def colours(folder: Path, counts: dict[str, int], names: Sequence[str] = ("red", "green", "blue")) -> Path:
    """Noisy pictures of one colour each, so many of each class for each part."""
    random = np.random.default_rng(0)
    for part, count in counts.items():
        for channel, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 90, (32, 32, 3), np.uint8)
                pixels[:, :, channel % 3] += 150
                Image.fromarray(pixels).save(folder / part / name / f"{i:03}.png")
    return folder


def cifar_binary(folder: Path, count: int = 2) -> Path:
    """CIFAR-10's six batches of so many pictures each, and its names."""
    random = np.random.default_rng(1)
    folder.mkdir(parents=True)
    for number, name in enumerate((*FIVE, "test_batch")):
        records = random.integers(0, 256, (count, 1 + PIXELS), dtype=np.uint8)
        records[:, 0] = (np.arange(count) + number) % 10
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("".join(f"kind {i}\n" for i in range(10)))
    return folder


def cifar_python(folder: Path, binary: Path) -> Path:
    """The pictures of a binary folder, as Python 2 pickled them: texts are bytes."""
    folder.mkdir()
    for path in binary.glob("*.bin"):
        records = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 1 + PIXELS)
        (folder / path.stem).write_bytes(python_2(records[:, 1:].tobytes(), records[:, 0].tolist()))
    names = b"(lp0\n" + b"".join(f"S'kind {i}'\na".encode() for i in range(10))
    (folder / "batches.meta").write_bytes(b"(dp0\nS'label_names'\n" + names + b"s.")
    return folder


def python_2(pixels: bytes, labels: list[int]) -> bytes:
    """A batch in the opcodes of protocol 2, with what NumPy of Python 2 wrote for an array."""

    def text(value: bytes) -> bytes:
        return pickle.BINSTRING + len(value).to_bytes(4, "little") + value

    number = pickle.BININT1 + bytes([1])
    rows = pickle.BININT + len(labels).to_bytes(4, "little")
    columns = pickle.BININT + PIXELS.to_bytes(4, "little")
    kind = b"cnumpy\ndtype\n" + text(b"u1") + pickle.BININT1 + b"\0" + number + pickle.TUPLE3 + pickle.REDUCE
    kind += b"(" + pickle.BININT1 + b"\3" + text(b"|") + pickle.NONE * 3 + 3 * (pickle.BININT1 + b"\0") + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + pickle.BININT1 + b"\0" + pickle.TUPLE1
    array += text(b"b") + pickle.TUPLE3 + pickle.REDUCE
    array += b"(" + number + rows + columns + pickle.TUPLE2 + kind + pickle.NEWFALSE + text(pixels) + b"tb"
    listed = b"](" + b"".join(pickle.BININT1 + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + listed + b"u."
