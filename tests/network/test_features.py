"""What other networks stand on: timm's names, on the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel_parnet import (
    VARIANTS,
    Backbone,
    ParNetError,
    create_model,
    fold,
    load_checkpoint,
    save_checkpoint,
)
from small import SMALL, lively

X = torch.randn(2, 3, 64, 96)
with torch.device("meta"):
    SHAPES = {name: create_model(name, features_only=True).eval() for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
def test_features_are_what_feature_info_says(name: str) -> None:
    backbone = SHAPES[name]
    found, info = backbone(torch.zeros(1, 3, 64, 96, device="meta")), backbone.feature_info
    assert info.module_name() == ["streams.0", "streams.1", "streams.2", "fused"]
    assert [tuple(f.shape) for f in found] == [
        (1, c, 64 // r, 96 // r) for c, r in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert info.channels() == list(VARIANTS[name].planes)
    if VARIANTS[name].image_size == 224:
        assert info.reduction() == [4, 8, 16, 32]


def test_head_and_features_are_the_network() -> None:
    model = lively(SMALL, 1)
    with torch.no_grad():
        features = model.forward_features(X)
        assert torch.equal(model.forward_head(features), model(X))
        averages = model.forward_head(features, pre_logits=True)
        assert averages.shape == (2, model.num_features) and torch.equal(averages, features.mean((2, 3)))
        everything = Backbone(model)(X)
        assert torch.equal(everything[-1], features) and len(everything) == 4
        assert torch.equal(Backbone(model, (-2, -1))(X)[0], everything[2])


def test_averages_drop_out_in_training_alone() -> None:
    """Half of them, and the others are twice as large."""
    model, features = create_model(replace(SMALL, dropout=0.5)), torch.ones(8, 64, 2, 2)
    dropped = model.train().forward_head(features, pre_logits=True)
    assert set(dropped.unique().tolist()) == {0, 2} and 0.3 < dropped.eq(0).float().mean() < 0.7
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), torch.ones(8, 64))


@pytest.mark.parametrize("indices", [(1,), (0, 2), (1, 2, 3), (3,)])
def test_every_weight_that_is_asked_for_is_trained(indices: tuple[int, ...]) -> None:
    backbone = create_model(SMALL, features_only=True, out_indices=indices)
    sum(feature.square().mean() for feature in backbone(X)).backward()
    reached = {
        name.split(".")[2] for name, p in backbone.named_parameters() if p.grad is not None and "streams" in name
    }
    assert reached == ({"0", "1", "2"} if 3 in indices else {str(i) for i in indices})
    if 3 in indices:
        assert all(p.grad is not None for p in backbone.parameters())


def test_another_classifier_and_none(tmp_path: Path) -> None:
    model = lively(SMALL, 1)
    with torch.no_grad():
        features = model.forward_features(X)
        model.reset_classifier(7)
        assert model(X).shape == (2, 7) and (model.num_classes, model.config.labels) == (7, ())
        model.bfloat16().reset_classifier(3)
        assert model.get_classifier().weight.dtype == torch.bfloat16
        model.float().reset_classifier(0)
        features = model.forward_features(X)
        assert torch.equal(model(X), features.mean((2, 3))) and isinstance(model.get_classifier(), torch.nn.Identity)
        save_checkpoint(model, tmp_path / "body.safetensors")
        assert torch.equal(load_checkpoint(tmp_path / "body.safetensors")(X), model(X))
    assert create_model(SMALL, num_classes=0).num_classes == 0
    with pytest.raises(ParNetError, match=r"no classifier: give fold outputs, some of streams.0"):
        fold(model)


@pytest.mark.parametrize("indices", [(), (4,), (1, 1), (2, 1), (-5,)])
def test_indices_that_are_not_there(indices: tuple[int, ...]) -> None:
    with pytest.raises(ParNetError, match="give some of 0 to 3, in order, each once"):
        create_model(SMALL, features_only=True, out_indices=indices)


def test_indices_of_a_classifier() -> None:
    with pytest.raises(ParNetError, match="give features_only=True"):
        create_model(SMALL, out_indices=(1,))  # type: ignore[call-overload]


@pytest.mark.parametrize("indices", [(0,), (0, 2), (1,), (0, 1, 2), (1, 3), None])
def test_what_no_feature_needs_is_frozen(indices: tuple[int, ...] | None) -> None:
    """DDP waits for the gradient of each parameter that is not."""
    trained = Backbone(create_model(SMALL, num_classes=0), indices)
    trained.freeze_unreached()
    for backbone in (create_model(SMALL, features_only=True, out_indices=indices), trained):
        sum(feature.sum() for feature in backbone(X)).backward()  # type: ignore[union-attr]
        for name, parameter in backbone.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None), name
        assert any(parameter.requires_grad for parameter in backbone.parameters())
