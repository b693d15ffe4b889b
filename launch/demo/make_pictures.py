#!/usr/bin/env python
"""Write the first test picture of each Fashion-MNIST class as a PNG here, and their labels as labels.json.

python launch/demo/make_pictures.py /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from common import DEMO
from parallel_parnet.files import write_json
from parallel_parnet.variants import FASHION_LABELS
from train import read_idx

images, labels = (read_idx(Path(sys.argv[1]), f"t10k-{part}-ubyte") for part in ("images-idx3", "labels-idx1"))
truth = {}
for index, name in enumerate(FASHION_LABELS):
    first = int((labels == index).argmax())
    file = f"{index}-{name.lower().replace('/', '-').replace(' ', '-')}.png"
    Image.fromarray(images[first]).save(DEMO / "pictures" / file, optimize=True)
    truth[file] = name
write_json(DEMO / "labels.json", truth)
