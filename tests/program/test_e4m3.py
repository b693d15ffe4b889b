"""Programs in fp8: what they must be, what torch computes of them, against numbers in numpy, and who runs them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallel_parnet import Engine, ParNetError
from parallel_parnet.executors.available import choose_executor
from parallel_parnet.program.arithmetic import in_e4m3
from parallel_parnet.program.contract import E4M3
from program.test_quantised import OP, PROGRAMS, changed, rounded

CPU = torch.device("cpu")
PROGRAM = PROGRAMS[E4M3]
STEP, WEIGHT = PROGRAM.weights["streams.0.0.step"], PROGRAM.weights[f"{OP}.weight"]
ZERO = torch.tensor([7], dtype=torch.uint8)
BROKEN: list[tuple[dict[str, Tensor | None], str]] = [
    ({"streams.0.0.step": None}, f"'{OP}': its weight is e4m3, and 'streams.0.0', which it reads, is not in e4m3"),
    ({f"{OP}.weight_step": None}, f"'{OP}': a weight in int8 or e4m3 has a weight_step, and no other has one"),
    ({f"{OP}.weight": WEIGHT.float()}, f"'{OP}': a weight in int8 or e4m3 has a weight_step"),
    ({f"{OP}.weight": WEIGHT.to(torch.float8_e5m2)}, f"'{OP}': a weight in int8 or e4m3 has a weight_step"),
    ({f"{OP}.weight": WEIGHT.float().to(torch.int8)}, f"'{OP}': its weight is int8, and .* is not in uint8"),
    ({f"{OP}.weight": torch.full_like(WEIGHT, torch.nan)}, "weight holds non-finite"),
    ({"streams.0.0.zero": ZERO}, "those in e4m3 a step: a program has one or the other"),
    ({f"{name}.zero": ZERO for name in PROGRAM.by_name if f"{name}.step" in PROGRAM.weights}
     | {f"{name}.step": torch.ones(1) for name in PROGRAM.by_name if f"{name}.step" in PROGRAM.weights},
     "its weight is e4m3, and .*, which it reads, is not in e4m3"),
    ({"streams.0.0.step": STEP[:1]}, r"step is \[1\] of torch.float32, .* expected \[8\] of float32"),
    ({"streams.0.0.step": STEP * 1.5}, "steps of e4m3 that are no powers of two"),
    ({"streams.0.0.step": STEP * 0}, "step holds 0.0 to 0.0: a feature's steps are"),
    ({"streams.0.0.step": torch.full((8,), 2.0**120)}, "step holds .*: a feature's steps are 1.2e-38 to 6.6e"),
    ({"inits.0.0.weight": PROGRAM.weights["inits.0.0.weight"].to(E4M3), "inits.0.0.weight_step": torch.ones(8)},
     "'inits.0.0': its weight is e4m3, and 'input', which it reads, is not in e4m3"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_what_a_program_in_fp8_must_be(weights: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ParNetError, match=message):
        changed(PROGRAM, weights)


def test_bytes_of_an_operation() -> None:
    row = next(row for row in PROGRAM.cost(64, batch=2, itemsize=2).operations if row.name == OP)
    weights = 8 * 8 * 9 + 2 * (8 * 8 + 6 * 8)  # bias, gate bias, scale, shift, and both steps, as of other types
    assert row.bytes == 2 * 2 * 16 * 16 * 8 + weights


@given(st.floats(-500, 500, width=32), st.integers(-126, 119))
def test_rounding(value: float, exponent: int) -> None:
    """To the bit, in any step, and the same again."""
    step, values = torch.tensor([2.0**exponent]), torch.tensor([value, value / 4096, value / 2**20])
    found = in_e4m3(step * values, step)
    exact = (step * values).double().numpy() / step.double().numpy()
    assert (found.double().numpy() == step.double().numpy() * rounded(exact)).all()
    assert torch.equal(in_e4m3(found, step), found)


def test_what_e4m3_cannot_hold() -> None:
    """The largest number stands for what is larger, and a sensor that fails is not hidden."""
    step = torch.tensor([0.5])
    assert in_e4m3(torch.tensor([1e30, torch.inf, -225.0, -torch.inf]), step).tolist() == [224, 224, -224, -224]
    assert in_e4m3(torch.tensor([torch.nan]), step).isnan().all()
    x = torch.randn(1, 3, 64, 64)
    x[0, 1, 30, 30] = torch.nan
    assert Engine(PROGRAM, device="cpu", executor="eager")(x).isnan().all()


def test_who_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch for "auto"; the kernels where a GPU has fp8, which alone take the type of what is not in fp8."""
    monkeypatch.setattr("parallel_parnet.executors.available.lacking", lambda backend: None)
    gpu, fp32 = torch.device("cuda"), torch.float32
    assert choose_executor("auto", CPU, fp32, E4M3) == choose_executor("auto", gpu, fp32, E4M3) == "eager"
    for executor in ("native", "inductor", "openvino"):
        message = f"executor {executor} runs no program quantised to float8_e4m3fn: choose triton, eager, reference"
        with pytest.raises(ParNetError, match=message):
            choose_executor(executor, CPU, fp32, E4M3)
    with pytest.raises(ParNetError, match="bfloat16 for a quantised program"):
        choose_executor("eager", gpu, torch.bfloat16, E4M3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert choose_executor("triton", gpu, torch.bfloat16, E4M3) == "triton"
    assert choose_executor("cuda_graph", gpu, fp32, E4M3) == "cuda_graph"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(ParNetError, match=r"runs fp8 from compute capability 8.9 on, this GPU has 8.6: choose eager$"):
        choose_executor("triton", gpu, torch.bfloat16, E4M3)
    assert Engine(PROGRAM, device="cpu").arithmetic == E4M3
