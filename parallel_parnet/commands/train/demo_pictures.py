"""Write the first test picture of each Fashion-MNIST class as a PNG in launch/demo, and their labels as labels.json.

python -m parallel_parnet.commands.train.demo_pictures /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import sys
from pathlib import Path

from parallel_parnet.commands.common import DEMO
from parallel_parnet.commands.data.finding import open_split
from parallel_parnet.commands.data.split import TEST
from parallel_parnet.files import write_json
from parallel_parnet.network.variants import FASHION_LABELS

pictures = open_split(Path(sys.argv[1]), TEST)
truth = {}
for index, name in enumerate(FASHION_LABELS):
    first = int((pictures.truth == index).argmax())
    file = f"{index}-{name.lower().replace('/', '-').replace(' ', '-')}.png"
    pictures.open(first).save(DEMO / "pictures" / file, optimize=True)
    truth[file] = name
write_json(DEMO / "labels.json", truth)
