"""Write the first test picture of each Fashion-MNIST class as a PNG in launch/demo, and their labels as labels.json.

python -m parallel_parnet.commands.train.demo_pictures /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from parallel_parnet.commands.common import DEMO
from parallel_parnet.commands.train.command import read_idx
from parallel_parnet.files import write_json
from parallel_parnet.network.variants import FASHION_LABELS

images, labels = (read_idx(Path(sys.argv[1]), f"t10k-{part}-ubyte") for part in ("images-idx3", "labels-idx1"))
truth = {}
for index, name in enumerate(FASHION_LABELS):
    first = int((labels == index).argmax())
    file = f"{index}-{name.lower().replace('/', '-').replace(' ', '-')}.png"
    Image.fromarray(images[first]).save(DEMO / "pictures" / file, optimize=True)
    truth[file] = name
write_json(DEMO / "labels.json", truth)
