"""Each optimizer's updates are those of an independent computation, on every layout."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from engine_support import (
    CLIP,
    SAMPLES,
    build_engine,
    fp32_weights,
    global_batch,
    run_config,
    share,
)
from plain_gpt import PlainGPT, PlainShape
from rounding import assert_close
from torch import Tensor, nn
from transformers.optimization import Adafactor

from megaphase.checkpoint.parameters import Piece
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.parameter_spec import Normal, ParameterSpec
from megaphase.distributed.process_grid import ProcessGrid, start_process_grid
from megaphase.optim.addresses import Addresses, Fragment, MasterGroup
from megaphase.optim.config import MuonConfig
from megaphase.optim.muon import Muon
from megaphase.training.engine import Engine

STEPS = 4
PROCESSES = 4
LAYOUTS = [(tensor, zero) for tensor in (1, 2, 4) for zero in range(4)]
MODEL = {"ffn": 64}
# With their learning rates.
OPTIMIZERS: dict[str, tuple[dict[str, Any], float]] = {
    "adafactor": ({"name": "adafactor", "weight_decay": 0.5}, 1e-2),
    "adafactor with beta1": ({"name": "adafactor", "beta1": 0.9, "weight_decay": 0.5}, 1e-2),
    "lion": ({"name": "lion", "weight_decay": 0.5}, 1e-3),
    "muon": (
        {"name": "muon", "weight_decay": 0.5, "adamw": {"learning_rate_factor": 0.5}},
        1e-2,
    ),
}
# A sign, or a root of a small sum, amplifies rounding.
SAME = 1e-4
BF16 = 2.0**-7

Curve = list[tuple[float, float]]


def train(name: str, tensor: int, zero: int, precision: str = "fp32") -> tuple[Engine, Curve]:
    optimizer, rate = OPTIMIZERS[name]
    config = run_config(
        model=MODEL, tensor=tensor, zero=zero, precision=precision, optimizer=optimizer
    )
    engine = build_engine(config)
    curve = []
    for step in range(STEPS):
        result = engine.train_step(share(global_batch(step), engine.grid), rate)
        curve.append((result.losses.mean, result.grad_norm))
    return engine, curve


def alone() -> dict[str, tuple[dict[str, Tensor], Curve, dict[str, Tensor]]]:
    """Return of each optimizer the weights before training, the curve, and the weights after."""
    found = {}
    with process_group():
        start_process_grid(1)
        start = fp32_weights(build_engine(run_config(model=MODEL, tensor=1, zero=0)))
        for name in OPTIMIZERS:
            engine, curve = train(name, 1, 0)
            found[name] = start, curve, fp32_weights(engine)
    return found


@once
def trained_alone() -> dict[str, tuple[dict[str, Tensor], Curve, dict[str, Tensor]]]:
    return run_ranks(alone, 1, timeout=600)[0]


def on_layouts(layouts: list[tuple[str, int, int]]) -> list[Curve]:
    with process_group():
        start_process_grid(1)
        return [train(*layout)[1] for layout in layouts]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layouts",
    [
        [(2, 0), (2, 3)],
        pytest.param(LAYOUTS, marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_losses_are_those_of_one_process(layouts: list[tuple[int, int]]) -> None:
    cases = [(name, *layout) for name in OPTIMIZERS for layout in layouts]
    for curves in run_ranks(on_layouts, PROCESSES, cases, timeout=900):
        for (name, *layout), curve in zip(cases, curves, strict=True):
            expected = trained_alone()[name][1]
            assert len(curve) == STEPS
            for (loss, norm), (wanted, wanted_norm) in zip(curve, expected, strict=True):
                assert loss == pytest.approx(wanted, rel=SAME), (name, layout)
                assert norm == pytest.approx(wanted_norm, rel=SAME), (name, layout)


# --- plain references, in fp64, one tensor at a time ---


def no_decay(name: str) -> bool:
    return "norm" in name or name.endswith("bias")


class PlainLion:
    """Algorithm 2 of Chen et al. 2023."""

    def __init__(self) -> None:
        self.momentum: dict[str, Tensor] = {}

    def step(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
        momentum = self.momentum.get(name, torch.zeros_like(weight))
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        self.momentum[name] = 0.99 * momentum + 0.01 * gradient
        decay = 0.0 if no_decay(name) else 0.5
        return weight - rate * (update + decay * weight)


class PlainMuon:
    """Nesterov momentum, five iterations in fp64 and the scale of Moonlight; AdamW by torch."""

    def __init__(self) -> None:
        self.momentum: dict[str, Tensor] = {}
        self.adamw: dict[str, tuple[nn.Parameter, torch.optim.AdamW]] = {}

    def step(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
        decay = 0.0 if no_decay(name) else 0.5
        if no_decay(name) or name in ("embedding.weight", "head.weight"):
            if name not in self.adamw:
                parameter = nn.Parameter(weight.clone())
                adamw = torch.optim.AdamW([parameter], rate / 2, (0.9, 0.95), 1e-8, decay)
                self.adamw[name] = parameter, adamw
            parameter, adamw = self.adamw[name]
            parameter.grad = gradient
            adamw.step()
            return parameter.detach().clone()
        momentum = 0.95 * self.momentum.get(name, torch.zeros_like(weight)) + 0.05 * gradient
        self.momentum[name] = momentum
        nesterov = 0.05 * gradient + 0.95 * momentum
        parts = 3 if name.endswith("qkv.weight") else 2 if name.endswith("up.weight") else 1
        update = torch.cat([_orthogonal(part) for part in nesterov.chunk(parts)])
        return weight - rate * (update + decay * weight)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The odd polynomial of the singular values, by their decomposition."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / matrix.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return 0.2 * max(matrix.shape) ** 0.5 * (left * values) @ right


class PlainAdafactor:
    """That of transformers; weight decay is decoupled from the scale of the weights."""

    def __init__(self, beta1: float | None = None) -> None:
        self.beta1 = beta1
        self.of: dict[str, tuple[nn.Parameter, Adafactor]] = {}

    def step(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
        if name not in self.of:
            settings = {"relative_step": False, "warmup_init": False, "beta1": self.beta1}
            parameter = nn.Parameter(weight.clone())
            self.of[name] = parameter, Adafactor([parameter], lr=rate, **settings)
        parameter, optimizer = self.of[name]
        parameter.data.copy_(weight)
        parameter.grad = gradient
        optimizer.step()
        decay = 0.0 if no_decay(name) else 0.5
        return parameter.detach() - rate * decay * weight


PLAIN: dict[str, Any] = {
    "adafactor": PlainAdafactor,
    "adafactor with beta1": partial(PlainAdafactor, 0.9),
    "lion": PlainLion,
    "muon": PlainMuon,
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_a_plain_loop(name: str) -> None:
    start, curve, found = trained_alone()[name]
    model = PlainGPT(start, PlainShape(layers=2, heads=4, kv_heads=4))
    plain, rate = PLAIN[name](), OPTIMIZERS[name][1]
    clipped = 0
    for step in range(STEPS):
        batch = global_batch(step)
        assert len(batch) == SAMPLES
        loss = model.losses(batch.inputs, batch.targets).mean()
        loss.backward()
        gradients = {each: weight.grad for each, weight in model.weights.items()}
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        assert (loss.item(), norm) == pytest.approx(curve[step], rel=SAME)
        clipped += norm > CLIP
        for each, weight in model.weights.items():
            gradient = gradients[each] * min(1.0, CLIP / (norm + 1e-6))
            weight.data = plain.step(each, weight.data, gradient, rate)
            weight.grad = None
    assert clipped > 0
    for each, weight in model.weights.items():
        # Elements whose gradient is all rounding may have another sign.
        assert_close(found[each], weight.data, 1e-3, each)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_is_torch_s_own(shape: tuple[int, int]) -> None:
    """In bf16, in which torch's computes."""
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(shape))
    start = weight.detach().clone()
    other = nn.Parameter(start.clone())
    own = alone_in_one_process(other)
    settings = {"momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    golden = torch.optim.Muon([weight], lr=0.02, **settings)
    for _ in range(STEPS):
        weight.grad = torch.randn(shape)
        other.grad = weight.grad.clone()
        golden.step()
        own.step()
    assert_close(other.detach() - start, weight.detach() - start, BF16)


def alone_in_one_process(weight: nn.Parameter) -> Muon:
    """Return Muon of one matrix."""
    group = {"params": [weight], "lr": 0.02, "weight_decay": 0.1, "update": "muon"}
    optimizer = Muon([group], MuonConfig(name="muon"), torch.bfloat16, lr=0.02)
    grid = ProcessGrid(1, 0, 1, None, None)  # type: ignore[arg-type]  # nothing travels
    piece = Piece(0, weight.numel())
    master = MasterGroup(weight, [Fragment("w", piece, 0)], ["w"])
    spec = ParameterSpec(tuple(weight.shape), Normal(0.02), matrix=True)
    groups = {id(weight): master}
    optimizer.addresses = Addresses(grid, 0, {"w": spec.layout(1)}, {"w": spec}, groups)
    return optimizer
