"""Draw a folder of made-up pictures of three classes, to try training and validating on.

python -m parallel_parnet.commands.train.made_up FOLDER

FOLDER gets train/ and val/, each with disc/, square/ and triangle/: 48 x 48 pixels, any two colours, any place, size
and turn, noise over all of it. The same pictures every time; no picture of val/ is in train/.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from parallel_parnet import ParNetError

from ..common import Parser
from ..ending import run

SIDE = 48
CORNERS = {"disc": 64, "square": 4, "triangle": 3}
COUNTS = {"train": 200, "val": 100}  # of each class
NOISE = 12.0  # levels, standard deviation
LEAST_CONTRAST = 80  # levels of grey


def picture(corners: int, random: Random) -> Image.Image:
    """A regular polygon, RGB."""
    while True:
        ground, colour = ([random.randrange(256) for _ in range(3)] for _ in range(2))
        if abs(sum(ground) - sum(colour)) > 3 * LEAST_CONTRAST:
            break
    radius, turn = random.uniform(10, 18), random.uniform(0, 2 * math.pi)
    x, y = (random.uniform(radius, SIDE - radius) for _ in range(2))
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    image = Image.new("RGB", (SIDE, SIDE), tuple(ground))
    outline = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    ImageDraw.Draw(image).polygon(outline, fill=tuple(colour))
    noise = np.random.default_rng(random.getrandbits(32)).normal(0, NOISE, (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def draw(folder: Path, counts: dict[str, int]) -> None:
    """Write `counts` pictures of each class for train/ and val/."""
    for part, count in counts.items():
        for name, corners in CORNERS.items():
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                picture(corners, Random(f"{part} {name} {i}")).save(folder / part / name / f"{i:03}.png")


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made where it is not there")
    folder = parser.parse_args().folder
    try:
        draw(folder, COUNTS)
    except OSError as error:
        raise ParNetError(f"{folder}: cannot be written ({error.strerror})") from None
    said = ", ".join(f"{count * len(CORNERS)} in {folder / part}" for part, count in COUNTS.items())
    print(f"pictures of {', '.join(CORNERS)}: {said}")
    return 0


if __name__ == "__main__":
    run(main)
