"""Train a ParNet on a folder in the MNIST layout (four .gz files), such as Fashion-MNIST.

apt-get install dataset-fashion-mnist
python launch/train.py /usr/share/datasets/fashion-mnist --out launch/demo/parnet_fashion.safetensors
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from parallel_parnet import ParNet, create_model
from parallel_parnet.errors import ParNetError
from parallel_parnet.files import as_json, write_json
from parallel_parnet.network.checkpoint import load_checkpoint, save_checkpoint
from parallel_parnet.preprocess import Preprocess


def read_idx(folder: Path, name: str) -> np.ndarray:
    """A file of the IDX layout: two zero bytes, type 8 (uint8), number of dimensions, each size, the values."""
    path = folder / f"{name}.gz"
    try:
        data = gzip.decompress(path.read_bytes())
        if data[:3] != b"\0\0\x08":
            raise ParNetError(f"{path}: not an IDX file of bytes")
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, ValueError) as error:
        raise ParNetError(f"{path}: cannot be read as an IDX file ({error})") from None


def load_split(folder: Path, split: str, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Grey pixels uint8 [N, size, size], prepared as the engine prepares them, and labels int64 [N]."""
    images, labels = read_idx(folder, f"{split}-images-idx3-ubyte"), read_idx(folder, f"{split}-labels-idx1-ubyte")
    if len(images) != len(labels):
        raise ParNetError(f"{folder}: {len(images)} pictures but {len(labels)} labels in {split}")
    pixels = np.stack([preprocess.pixels(Image.fromarray(image))[:, :, 0] for image in images])
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))


def augment(pixels: Tensor, shift: int = 3) -> Tensor:
    """Each picture [N, H, W] mirrored or not, and moved by up to `shift` pixels over a black border."""
    n, h, w = pixels.shape
    padded = F.pad(pixels, (shift,) * 4)
    mirrored = torch.where(torch.rand(n, 1, 1) < 0.5, padded.flip(2), padded)
    dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1, 1))
    rows, columns = torch.arange(h).view(1, h, 1) + dy, torch.arange(w).view(1, 1, w) + dx
    return mirrored[torch.arange(n).view(n, 1, 1), rows, columns]


def to_input(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Grey uint8 [N, H, W] to the network's fp32 [N, 3, H, W] in channels_last memory."""
    x = preprocess.normalise(pixels.unsqueeze(-1).expand(-1, -1, -1, 3))
    return x.to(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: torch.nn.Module, pixels: Tensor, labels: Tensor, preprocess: Preprocess) -> float:
    """Share of pictures whose top-1 class is right."""
    model.eval()
    right = sum(
        (model(to_input(batch, preprocess)).argmax(1) == truth).sum().item()
        for batch, truth in zip(pixels.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def train(model: ParNet, args: argparse.Namespace, data: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict:
    """SGD with one cosine cycle; returns the log. `model` ends with the moving average of its weights."""
    preprocess, (pixels, labels) = Preprocess.of(model.config), data
    model.to(memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=args.weight_decay
    )
    steps = args.epochs * (len(labels) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.15)
    log: list[dict] = []
    for epoch in range(1, args.epochs + 1):
        start, losses = time.perf_counter(), []
        model.train()
        batches = torch.randperm(len(labels)).split(args.batch_size)[: len(labels) // args.batch_size]
        for index in track(batches, f"epoch {epoch}", transient=True):
            logits = model(to_input(augment(pixels[index]), preprocess))
            loss = F.cross_entropy(logits, labels[index], label_smoothing=args.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
            losses.append(loss.item())
        score = accuracy(average.module, *test, preprocess)
        log.append({"epoch": epoch, "loss": round(sum(losses) / len(losses), 4), "test_accuracy": score})
        print(f"{log[-1]} {time.perf_counter() - start:.0f} s", flush=True)
    model.load_state_dict(average.module.state_dict())
    return {"epochs": log, "test_accuracy": log[-1]["test_accuracy"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train-/t10k- images and labels in .gz files")
    parser.add_argument("-m", "--model", default="parnet_fashion", help="variant (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, .safetensors")
    parser.add_argument("--evaluate", action="store_true", help="only test the checkpoint at --out")
    parser.add_argument("--log", type=Path, help="JSON file for settings and accuracy per epoch")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("-b", "--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = load_checkpoint(args.out) if args.evaluate else create_model(args.model)
    preprocess = Preprocess.of(model.config)
    test = load_split(args.data, "t10k", preprocess)
    if args.evaluate:
        print(as_json({"checkpoint": str(args.out), "test_accuracy": accuracy(model, *test, preprocess)}))
        return 0
    result = train(model, args, load_split(args.data, "train", preprocess), test)
    save_checkpoint(model, args.out)
    if args.log:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "evaluate"}
        record = {"settings": settings, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), **result}
        write_json(args.log, record)
    return 0
