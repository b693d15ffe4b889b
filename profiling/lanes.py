"""What a lane tells the coordinator about recorded requests: its spans, as JSON, and nothing pickled."""

from __future__ import annotations

import json
from dataclasses import astuple

import torch
from torch import Tensor

from ..errors import LaneError
from .spans import Recorder, Span


def to_bytes(recorder: Recorder) -> Tensor:
    """Encode a lane's spans as bytes, uint8 [length]."""
    text = json.dumps([astuple(span) for span in recorder.spans]).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def from_bytes(text: Tensor, lane: int) -> Recorder:
    """Decode what `to_bytes` of that lane gave. LaneError for anything else."""
    try:
        return Recorder(spans=[Span(*fields) for fields in json.loads(bytes(text.tolist()))])
    except (ValueError, TypeError) as error:
        raise LaneError(f"lane {lane} sent spans that cannot be read ({error})") from error
