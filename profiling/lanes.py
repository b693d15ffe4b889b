"""What a lane tells the coordinator about a recorded request: its spans, as JSON, and nothing pickled."""

from __future__ import annotations

import json
from dataclasses import astuple

import torch

from ..errors import LaneError
from ..transport import Transport
from .spans import Recorder, Span


def tell(transport: Transport, coordinator: int, tag: int, recorder: Recorder) -> None:
    """Send a lane's spans."""
    text = json.dumps([astuple(span) for span in recorder.spans]).encode()
    for part in (torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8)):
        transport.wait(transport.send(part, coordinator, tag, "spans"), "spans")


def hear(transport: Transport, lane: int, tag: int) -> Recorder:
    """Receive them."""
    length = torch.zeros(1, dtype=torch.int64)
    transport.wait(transport.receive(length, lane, tag, "spans"), "spans")
    text = torch.zeros(int(length), dtype=torch.uint8)
    transport.wait(transport.receive(text, lane, tag, "spans"), "spans")
    try:
        spans = [Span(*fields) for fields in json.loads(bytes(text.tolist()))]
    except (ValueError, TypeError) as error:
        raise LaneError(f"lane {lane} sent spans that cannot be read ({error})") from error
    return Recorder(spans=spans)
