"""What a configuration must be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel_parnet import ParNetError, create_model
from small import SMALL


@pytest.mark.parametrize(("fields", "message"), [
    ({"planes": 8}, "planes 8: give a tuple"), ({"planes": (8,), "blocks": ()}, "give 2 to 5 widths"),
    ({"blocks": (4, 5)}, "give one count for each of the 3 streams"),
    ({"planes": (8, 18, 32, 64)}, "need a width divisible by 4"),
    *[(fields, "classes and pixels must be positive") for fields in (
        {"planes": (8, 16, 32, 0)}, {"planes": (8, 16.0, 32, 64)}, {"blocks": (1, 1, 10**9)}, {"image_size": 0},
        {"image_size": 32.0}, {"num_classes": True}, {"num_classes": False}, {"num_classes": -1}, {"num_classes": 0.0},
        {"num_classes": None},
    )],
    ({"activation": "gelu"}, "activation 'gelu': choose one of silu, relu"),
    *[({"stem_strides": strides}, "two strides, each 1 or 2") for strides in ((2, 3), (1, 3), (1.0, 2), (True, 2))],
    *[({"dropout": dropout}, "give dropout in 0..1") for dropout in (1.0, 10**400)],
    *[({"crop": crop}, "and crop in 0..1, not 0") for crop in (0.0, 1.5, "1", 10**400)],
    *[({"mean": mean}, "mean .*: give a number for each of red") for mean in (
        (0.0, 0.0), (float("inf"), 0.0, 0.0), (-1e39, 0, 0), (10**400, 0, 0),
    )],
    *[({"std": std}, "std .*: give a number for each of red") for std in ((1.0, float("nan"), 1.0), (1e39,) * 3)],
    *[({"std": std}, "pictures are divided by it") for std in ((0.0, 1.0, 1.0), (1e-50,) * 3)],
    ({"labels": ("a",)}, "1 labels for 10 classes"), ({"labels": tuple(range(10))}, "labels .*: give names"),
], ids=str)  # fmt: skip
def test_what_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        replace(SMALL, **fields)


def test_unknown_variant() -> None:
    with pytest.raises(ParNetError, match="parnet_s, parnet_m"):
        create_model("parnet_xxl")
