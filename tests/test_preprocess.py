"""Pictures to tensors, and pictures that are none."""

from __future__ import annotations

import os
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import ROOT
from parallel_parnet import ParNetError
from parallel_parnet.network.variants import VARIANTS
from parallel_parnet.preprocess import Preprocess, find_images, passed_over, read_image, to_rgb

PREPROCESS = Preprocess.of(VARIANTS["parnet_s"])


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (224, 224), (50, 31), (300, 1)])
def test_resize_and_crop_against_torch(size: tuple[int, int]) -> None:
    image = picture(*size)
    x = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float()
    scale = 256 / min(size)
    h, w = (max(224, round(side * scale)) for side in (size[1], size[0]))
    resized = F.interpolate(x, (h, w), mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (h - 224) // 2, (w - 224) // 2
    expected = resized[0, :, top : top + 224, left : left + 224].permute(1, 2, 0)
    got = torch.from_numpy(PREPROCESS.pixels(image).copy())
    assert got.shape == (224, 224, 3)
    difference = (got.float() - expected).abs()
    assert difference.max() <= 1.6  # Pillow rounds, between its two passes too
    assert difference.mean() <= 0.4


def test_sizes_are_rounded_to_the_nearest() -> None:
    """32 / 0.875 is 36.6, and 80 * 37 / 50 is 59.2."""
    image = picture(50, 80)
    resized = np.asarray(image.resize((37, 59), Image.Resampling.BICUBIC))
    pixels = Preprocess(32, 0.875, PREPROCESS.mean, PREPROCESS.std).pixels(image)
    assert np.array_equal(pixels, resized[13:45, 2:34])


def test_raw_pictures_are_what_is_normalised(tmp_path: Path) -> None:
    picture(300, 260).save(tmp_path / "a.png")
    raw = PREPROCESS.raw(tmp_path / "a.png")
    assert raw.dtype == torch.uint8 and raw.shape == (3, 224, 224) and raw.is_contiguous()
    assert torch.equal(PREPROCESS.normalise(raw.movedim(0, -1)), PREPROCESS(tmp_path / "a.png"))


def test_pictures_of_pillow_are_as_their_files() -> None:
    """Where a program has them in memory, as frames of a camera."""
    file = ROOT / "launch" / "demo" / "pictures" / "7-sneaker.png"
    for make in (PREPROCESS, PREPROCESS.raw):
        with Image.open(file) as opened:
            assert torch.equal(make(opened), make(file))
        for other in (np.zeros((3, 3, 3), np.uint8), b"\x89PNG", torch.zeros(3, 3, 3)):
            with pytest.raises(ParNetError, match=f"of type {type(other).__name__}: give its path, or what Image.from"):
                make(other)  # type: ignore[arg-type]
    with pytest.raises(ParNetError, match=r"takes a Config, such as model\.config, and this is a Linear"):
        Preprocess.of(torch.nn.Linear(1, 1))  # type: ignore[arg-type]


def test_normalise() -> None:
    x = PREPROCESS.normalise(torch.tensor([0, 128, 255], dtype=torch.uint8).expand(2, 5, 3))
    expected = (torch.tensor([0, 128, 255]) / 255 - torch.tensor(PREPROCESS.mean)) / torch.tensor(PREPROCESS.std)
    assert x.shape == (3, 2, 5)
    torch.testing.assert_close(x[:, 0, 0], expected)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [*product([".png", ".webp"], ["RGB", "L", "RGBA", "P", "1"]), *product([".jpg"], ["RGB", "L", "1", "CMYK"])],
)
def test_formats_and_modes(suffix: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"p{suffix}"
    picture(60, 40, mode).save(path)
    x = PREPROCESS(path)
    assert x.shape == (3, 224, 224)
    assert x.isfinite().all()


def test_orientation(tmp_path: Path) -> None:
    image = picture(64, 48)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "p.png", exif=exif)
    turned = PREPROCESS.pixels(image.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(PREPROCESS.pixels(read_image(tmp_path / "p.png")), turned)


def test_what_a_picture_says_beside_its_pixels_is_read_once(tmp_path: Path) -> None:
    """Damage in it would be met again where nobody makes it the picture's reason."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("p.png", "p.jpg", "p.tif"):
        picture(64, 48).save(tmp_path / name, exif=exif)
        assert read_image(tmp_path / name).info == {} and not read_image(tmp_path / name).getexif()


def test_files_that_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").touch()
    picture(64, 64).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-200])
    for name, message in (
        ("text.png", "not a picture"), ("empty.jpg", "not a picture"), ("cut.png", "cannot be decoded"),
        ("absent.png", "no such file"),
    ):  # fmt: skip
        with pytest.raises(ParNetError, match=rf"{name}: .*{message}"):
            PREPROCESS(tmp_path / name)


def test_a_picture_of_zero_size(tmp_path: Path) -> None:
    picture(64, 64).save(tmp_path / "p.png")
    content = bytearray((tmp_path / "p.png").read_bytes())
    content[16:24] = bytes(8)  # width and height in the header
    (tmp_path / "p.png").write_bytes(content)
    with pytest.raises(ParNetError, match=r"p\.png"):
        PREPROCESS(tmp_path / "p.png")
    with pytest.raises(ParNetError, match="0 x 5 pixels"):
        PREPROCESS.pixels(Image.new("RGB", (0, 5)))


def test_a_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses what is over twice its limit, and only warns of what is less."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for width in (150, 250):
        Image.new("1", (width, 10)).save(tmp_path / "bomb.png")
        with pytest.raises(ParNetError, match="over 1000 pixels; scale it down"):
            PREPROCESS(tmp_path / "bomb.png")


def test_threads_leave_the_warnings_of_the_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of them gets past the limit, however they take turns."""
    for name, side in (("small", 60), ("large", 70)):
        picture(side, side).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 60)

    def answer(name: str) -> str:
        try:
            return str(read_image(tmp_path / f"{name}.png").size)
        except ParNetError as error:
            return str(error).rpartition(": ")[2]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = list(warnings.filters)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(answer, ["small", "large"] * 200))
        assert list(warnings.filters) == before
    assert set(found[::2]) == {"(60, 60)"} and set(found[1::2]) == {"over 3600 pixels; scale it down first"}


def test_an_icon_that_is_larger_than_its_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.ico"
    picture(64, 64).save(path, sizes=[(64, 64)])
    content = bytearray(path.read_bytes())
    content[6:8] = 8, 8
    path.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ParNetError, match="over 3600 pixels"):
            read_image(path)


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.PNG", "a.jpg", "c.webp", "d.jfif", "e.PGM", "f.ppm", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_images([tmp_path])] == ["a.jpg", "b.PNG", "c.webp", "d.jfif", "e.PGM", "f.ppm"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ParNetError, match="no pictures in this folder"):
        find_images([tmp_path / "none"])
    with pytest.raises(ParNetError, match="no such file or folder"):
        find_images([tmp_path / "absent"])
    with pytest.raises(ParNetError, match="no such file or folder"):
        find_images([tmp_path / ("n" * 300)])
    monkeypatch.setattr(Path, "iterdir", Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ParNetError, match=r"none: cannot be read \(Permission denied\)"):
        find_images([tmp_path / "none"])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_of_16_bits(suffix: str, tmp_path: Path) -> None:
    grey = np.asarray(picture(60, 40, "L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"16{suffix}")
    assert torch.equal(PREPROCESS.raw(tmp_path / f"16{suffix}"), PREPROCESS.raw(tmp_path / "8.png"))
    between = Image.fromarray(np.array([[0, 128, 129, 385, 386, 65535]], dtype=np.uint16))
    assert np.asarray(to_rgb(between))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 255], "to the nearest"


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_of_unknown_range(kind: type, tmp_path: Path) -> None:
    Image.fromarray(np.asarray(picture(60, 40, "L")).astype(kind)).save(tmp_path / "p.tif")
    with pytest.raises(ParNetError, match=r"p\.tif: grey of 32 bits .* save it with 8 or 16"):
        PREPROCESS(tmp_path / "p.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa", "P", "L", "RGB"])
def test_the_colour_of_what_is_transparent_does_not_matter(mode: str) -> None:
    """The left half is hidden, the right half is seen."""
    answers = []
    for hidden in (40, 200):
        level = np.full((64, 64), 120, np.uint8)
        level[:, :32] = hidden
        if mode in ("P", "L", "RGB"):  # as in a PNG whose one level, or colour, is transparent
            image = Image.fromarray(level).convert(mode)
            image.info["transparency"] = (hidden,) * 3 if mode == "RGB" else image.getpixel((0, 0))
        else:
            alpha = np.where(np.arange(64) < 32, 0, 255).astype(np.uint8) * np.ones((64, 1), np.uint8)
            image = Image.merge("LA", [Image.fromarray(level), Image.fromarray(alpha)])
            image = (image if mode in ("LA", "La") else image.convert("RGBA")).convert(mode)
        answers.append(np.asarray(to_rgb(image)))
    assert np.array_equal(*answers)
    assert (answers[0][:, :32] == 0).all() and (abs(answers[0][:, 32:].astype(int) - 120) <= 1).all()


def test_what_is_left_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert passed_over(tmp_path) is None
    for name in ("._a.jpg", ".hidden.png", "b.txt", "c", "d.NEF"):
        (tmp_path / name).touch()
    (tmp_path / "e.png").mkdir()
    assert [path.name for path in find_images([tmp_path])] == ["a.jpg"]
    assert passed_over(tmp_path) == (
        f"{tmp_path}: 3 file(s) passed over (.nef, .txt, no suffix), 1 folder(s) in it not searched"
    )


def png(path: Path, depth: int, kind: int, row: bytes, hidden: bytes) -> None:
    """A PNG of two pixels in a row; Pillow writes none of such depths. kind: 0 grey, 2 RGB; hidden: its tRNS."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", hidden), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    parts = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
             for name, data in chunks)  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize(("depth", "kind", "row", "hidden", "seen"), [
    (1, 0, b"\x80", (1,), 0), (2, 0, b"\x90", (2,), 85), (4, 0, b"\x93", (9,), 51), (8, 0, b"\xc8\x64", (200,), 100),
    (16, 0, struct.pack(">2H", 51456, 25700), (51456,), 100),
    (16, 2, struct.pack(">6H", *[51456] * 3, *[25700] * 3), (51456,) * 3, 100),
])  # fmt: skip
def test_transparent_levels_of_any_depth(
    depth: int, kind: int, row: bytes, hidden: tuple[int, ...], seen: int, tmp_path: Path
) -> None:
    png(tmp_path / "p.png", depth, kind, row, struct.pack(f">{len(hidden)}H", *hidden))
    assert np.asarray(read_image(tmp_path / "p.png")).tolist() == [[[0] * 3, [seen] * 3]]


def test_grey_of_16_bits_whose_zero_is_white(tmp_path: Path) -> None:
    grey = Image.fromarray(np.asarray(picture(60, 40, "L")).astype(np.uint16) * 257)
    grey.save(tmp_path / "p.tif", tiffinfo={262: 0})
    data = bytearray((tmp_path / "p.tif").read_bytes())
    entry = data.index(struct.pack("<HHI", 262, 3, 1))  # Pillow writes 1 in any case
    data[entry + 8 : entry + 10] = b"\0\0"
    (tmp_path / "p.tif").write_bytes(data)
    with pytest.raises(ParNetError, match=r"p\.tif: grey of 16 bits whose zero is white; save it with black as zero"):
        read_image(tmp_path / "p.tif")


@pytest.mark.parametrize("white", [65535, 4095])
def test_a_grey_pgm_says_what_is_white(white: int, tmp_path: Path) -> None:
    levels = (np.array([0, 0.4, 1]) * white).round().astype(">u2").tobytes()
    (tmp_path / "p.pgm").write_bytes(b"P5 3 1 %d\n" % white + levels)
    assert np.asarray(read_image(tmp_path / "p.pgm"))[0, :, 0].tolist() == [0, 102, 255]


@pytest.mark.parametrize("size", [(1, 65000), (65000, 1), (3, 20000)])
def test_a_line_of_pixels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut before it is resized, or it would take gigabytes."""
    areas, resize = [], Image.Image.resize

    def noted(image: Image.Image, target: tuple[int, int], *args: object) -> Image.Image:
        areas.append(target[0] * target[1])
        return resize(image, target, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", noted)
    pixels = PREPROCESS.pixels(Image.new("RGB", size, (10, 20, 30)))
    assert pixels.shape == (224, 224, 3) and (pixels == (10, 20, 30)).all()
    assert areas and max(areas) < 10_000_000


def test_cut_first_is_cut_in_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(640, 400)
    expected = PREPROCESS.pixels(image).astype(int)
    monkeypatch.setattr("parallel_parnet.preprocess.LONGEST", 1)
    difference = abs(PREPROCESS.pixels(image) - expected)
    assert difference.mean() < 1 and difference[4:-4, 4:-4].max() <= 4


def is_interned(name: str) -> bool:
    """Whether Python has the name in its table of interned strings."""
    copy = "".join(list(name))
    return sys.intern(copy) is not copy


def test_names_are_in_no_table_of_pythons(tmp_path: Path) -> None:
    """Which would grow as they are read, by megabytes at once; a new Path enters its name there before Python 3.14."""
    names = [f"only here {i}.png" for i in range(3)]
    for name in names:
        picture(32, 32).save(f"{tmp_path}/{name}")
    read, also = sorted(tmp_path.iterdir())[:2]
    read_image(read)
    kept = Path(also)
    assert str(kept).endswith(names[1])
    assert [is_interned(name) for name in names] == [False, sys.version_info < (3, 14), False]


def test_what_would_be_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ParNetError, match=r"pipe\.png: not a file"):
        PREPROCESS(tmp_path / "pipe.png")


def test_a_picture_that_is_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may run for ever: Ghostscript is not asked, whatever the file is called."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: pytest.fail("it was run"))
    picture(64, 64).save(tmp_path / "p.png", "EPS")
    with pytest.raises(ParNetError, match=r"p\.png: an EPS file, which is a program"):
        read_image(tmp_path / "p.png")


@pytest.mark.parametrize(
    "error", [SyntaxError, struct.error, ValueError, RuntimeError, NotImplementedError, MemoryError]
)
def test_whatever_a_decoder_raises_is_the_pictures_reason(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(64, 64).save(tmp_path / "p.png")

    def fail(image: Image.Image) -> None:
        raise error("from a plugin")

    monkeypatch.setattr("parallel_parnet.preprocess.ImageOps.exif_transpose", fail)
    with pytest.raises(ParNetError, match=rf"p\.png: cannot be decoded \({error.__name__}: from a plugin\)"):
        PREPROCESS(tmp_path / "p.png")


def test_damaged_exif(tmp_path: Path) -> None:
    """Whether or not it can be read: nothing but a reason or an answer, and no warning but Pillow's."""
    rng = np.random.default_rng(0)
    for i in range(100):
        exif = b"Exif\0\0" + (b"MM\0*\0\0\0\x08" if i % 2 else b"II*\0") + rng.bytes(40)
        picture(64, 64).save(tmp_path / "p.jpg", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with suppress(ParNetError):
                assert PREPROCESS(tmp_path / "p.jpg").isfinite().all()


def test_tiff_of_12_bits(tmp_path: Path) -> None:
    """Pillow reads it as grey of 16 bits, so that white would be dark."""
    tags = {256: 8, 257: 8, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 8, 279: 96}  # 8 x 8 pixels from byte 200
    entries = b"".join(struct.pack("<HHII", tag, 4 if value > 12 else 3, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "p.tif").write_bytes(head.ljust(200, b"\0") + b"\xff" * 96)
    with Image.open(tmp_path / "p.tif") as image:
        assert image.mode.startswith("I;16") and image.getpixel((0, 0)) == 4095
    with pytest.raises(ParNetError, match=r"p\.tif: grey of 12 bits a pixel; save it with 8 or 16"):
        PREPROCESS(tmp_path / "p.tif")
