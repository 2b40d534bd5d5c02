"""Promise 3: a run's numbers are the same for every layout, and those of a plain torch model.

Every case trains on the same batches. Its losses, losses by task, gradient norms and validation
losses must agree with `plain_gpt`, a model in float64 that starts from the weights of the 1 × 1
engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from distributed import once, run_ranks
from engine_support import (
    CANCELLATION,
    CLIP,
    MODEL,
    SOME,
    TASKS,
    VOCAB,
    WIDE,
    build_engine,
    fp32_weights,
    global_batch,
    model_weights,
    run_config,
    share,
)
from plain_gpt import IGNORED, PlainAdamW, PlainGPT, PlainShape
from rounding import FP32
from slow_cases import marked
from torch import Tensor

from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.sharding import padded_vocab
from megaphase.plan.dataset import Batch

STEPS = 30
FEW_STEPS = 10
LEARNING_RATE = 3e-3
VALIDATED_STEP = 5
VALIDATION_BATCH = 999
FALL = 0.8
BF16_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Variant:
    model: dict[str, Any] = field(default_factory=dict)
    vocab: int = VOCAB
    short: bool = False
    packed: bool = False

    def batch(self, step: int) -> Batch:
        return global_batch(step, vocab=self.vocab, short=self.short, packed=self.packed)


VARIANTS = {
    "base": Variant(),
    "gpt2": Variant(
        {
            "tied_embeddings": True,
            "bias": True,
            "norm": "layernorm",
            "position": "learned",
            "activation": "gelu",
        }
    ),
    "grouped": Variant({"kv_heads": 2}),
    "checkpointed": Variant({"activation_checkpointing": "full"}),
    "selective": Variant({"activation_checkpointing": "selective"}),
    "odd vocabulary": Variant(vocab=VOCAB + 1),
    "wide": Variant(WIDE),
    "short rows": Variant(short=True),
    "packed": Variant(packed=True),
    "packed gpt2": Variant(
        {"position": "learned", "bias": True, "activation_checkpointing": "full"}, packed=True
    ),
    "packed grouped": Variant({"kv_heads": 2}, short=True, packed=True),
    # Options of Gemma's that concern neither attention nor the place of norms. Logits reach about
    # twice the cap.
    "gemma": Variant(
        {
            "activation": "geglu",
            "zero_centered_norms": True,
            "embedding_multiplier": 32**0.5,
            "logit_softcap": 0.5,
            "tied_embeddings": True,
            "activation_checkpointing": "selective",
            "z_loss": 1e-2,
        },
        vocab=VOCAB + 1,
    ),
    "z_loss": Variant({"z_loss": 1e-2}, short=True),
    "windows": Variant({"sliding_window": 5, "attention_pattern": ["sliding", "full"]}),
    "packed windows": Variant(
        {
            "sliding_window": 3,
            "attention_pattern": ["full", "sliding"],
            "kv_heads": 2,
            "activation_checkpointing": "selective",
        },
        packed=True,
    ),
    "capped": Variant(
        {
            "sliding_window": 5,
            "attention_pattern": ["sliding", "full"],
            "attention_scale": 0.7,
            "attention_softcap": 0.1,
            "sliding_rotary": {"base": 100.0},
            "kv_heads": 2,
        }
    ),
    "packed capped": Variant(
        {"attention_softcap": 0.1, "activation_checkpointing": "full"}, packed=True
    ),
    "neox": Variant(
        {
            "norm": "layernorm",
            "activation": "gelu_erf",
            "bias": True,
            "ffn_bias": False,
            "rotary_dim": 2,
            "parallel_residual": True,
            "activation_checkpointing": "selective",
        },
    ),
    "xielu": Variant({"activation": "xielu", "activation_checkpointing": "selective"}),
}
# What the plain model has of the variants' attention.
ATTENTION: dict[str, dict[str, Any]] = {
    "windows": {"windows": (5, None)},
    "packed windows": {"windows": (None, 3)},
    "capped": {"windows": (5, None), "window_base": 100.0, "score_scale": 0.7, "score_cap": 0.1},
    "packed capped": {"score_cap": 0.1},
}


@dataclass(frozen=True)
class Case:
    variant: str
    tensor: int
    data: int
    zero: int
    sequence: bool = False
    precision: str = "fp32"
    micro: int = 4
    steps: int = FEW_STEPS
    keep_gathered: float = 0.0

    def __str__(self) -> str:
        extras = [
            *(["sequence"] if self.sequence else []),
            *([self.precision] if self.precision != "fp32" else []),
            *([f"micro {self.micro}"] if self.micro != 4 else []),
            *([f"keep_gathered {self.keep_gathered}"] if self.keep_gathered else []),
        ]
        return " ".join([self.variant, f"{self.tensor}x{self.data}", f"zero {self.zero}", *extras])


CASES = [
    *(Case("base", t, d, zero, steps=STEPS) for t, d, zero in product((1, 2), (1, 2), (0, 3))),
    Case("base", 1, 2, 1),
    Case("base", 1, 2, 2),
    Case("base", 2, 2, 1),
    Case("base", 2, 2, 2),
    Case("base", 1, 1, 0, micro=8),
    Case("base", 1, 1, 0, micro=2),
    Case("base", 1, 2, 3, micro=1),
    Case("base", 2, 1, 0, micro=1),
    Case("base", 2, 1, 0, sequence=True),
    Case("base", 2, 2, 3, sequence=True, micro=1),
    Case("base", 2, 2, 3, sequence=True),
    Case("gpt2", 1, 1, 0),
    Case("gpt2", 2, 1, 0),
    Case("gpt2", 2, 2, 3, sequence=True),
    Case("grouped", 1, 1, 0),
    Case("grouped", 2, 1, 3),
    Case("checkpointed", 1, 1, 0),
    Case("checkpointed", 2, 2, 3),
    Case("selective", 1, 1, 0),
    Case("selective", 2, 2, 3, sequence=True),
    Case("odd vocabulary", 1, 1, 0),
    Case("odd vocabulary", 2, 1, 0),
    Case("odd vocabulary", 2, 2, 3),
    Case("wide", 1, 1, 0),
    Case("wide", 1, 2, 3, micro=2),
    Case("wide", 1, 2, 3, micro=2, keep_gathered=SOME),
    Case("wide", 2, 2, 3, sequence=True, micro=2, keep_gathered=SOME),
    Case("wide", 2, 2, 3, keep_gathered=1.0),
    Case("short rows", 1, 1, 0),
    Case("short rows", 1, 2, 3),
    Case("short rows", 2, 2, 0),
    Case("packed", 1, 1, 0),
    Case("packed", 1, 2, 3),
    Case("packed", 2, 1, 0, micro=2),
    Case("packed", 2, 2, 3, sequence=True, micro=2),
    Case("packed gpt2", 1, 1, 0),
    Case("packed gpt2", 2, 1, 0, sequence=True),
    Case("packed gpt2", 2, 2, 3, sequence=True),
    Case("packed grouped", 1, 1, 0),
    Case("packed grouped", 2, 2, 3, sequence=True),
    Case("gemma", 1, 1, 0),
    Case("gemma", 2, 1, 0),
    Case("gemma", 2, 2, 3, sequence=True),
    Case("z_loss", 1, 1, 0),
    Case("z_loss", 2, 2, 3),
    Case("windows", 1, 1, 0),
    Case("windows", 2, 2, 3, sequence=True),
    Case("packed windows", 1, 1, 0),
    Case("packed windows", 2, 1, 0),
    Case("packed windows", 1, 2, 3),
    Case("packed windows", 2, 2, 3, sequence=True, micro=2),
    Case("capped", 1, 1, 0),
    Case("capped", 2, 2, 3, sequence=True),
    Case("packed capped", 1, 1, 0),
    Case("packed capped", 2, 2, 3),
    Case("neox", 1, 1, 0),
    Case("neox", 2, 1, 0),
    Case("neox", 2, 2, 3, sequence=True),
    Case("xielu", 1, 1, 0),
    Case("xielu", 2, 1, 0),
    Case("xielu", 2, 2, 3, sequence=True),
]
BF16_CASES = [
    Case("base", 1, 1, 0, precision="bf16", steps=STEPS),
    Case("base", 1, 2, 1, precision="bf16", steps=STEPS),
    Case("base", 2, 1, 2, precision="bf16", steps=STEPS),
    Case("base", 2, 2, 3, precision="bf16", steps=STEPS),
]

IN_FOUR_RANKS = ("base", "wide", "packed windows")
# Options that the other layouts of their variant cover, too.
SLOW = [
    case
    for case in CASES
    if case.tensor * case.data == 2
    or (case.tensor * case.data == 4 and case.variant not in IN_FOUR_RANKS)
    or case in (Case("base", 2, 2, 2), Case("wide", 2, 2, 3, keep_gathered=1.0))
]


@dataclass(frozen=True)
class Step:
    """Losses per token, in nats, and the norm of the gradients before clipping."""

    loss: float
    by_task: dict[str, float]
    grad_norm: float


@dataclass(frozen=True)
class Curve:
    steps: list[Step]
    validation: dict[str, float]
    weights_before: dict[str, Tensor]
    padding_after: list[Tensor]


def train_curves(cases: list[Case]) -> list[Curve]:
    """Run on a rank: train one engine after the other."""
    with process_group():
        return [_train(case) for case in cases]


def _train(case: Case) -> Curve:
    variant = VARIANTS[case.variant]
    config = run_config(
        model=variant.model,
        micro=case.micro,
        precision=case.precision,
        tensor=case.tensor,
        zero=case.zero,
        sequence=case.sequence,
        keep_gathered=case.keep_gathered,
    )
    engine = build_engine(config, variant.vocab)
    before = fp32_weights(engine)
    steps = []
    validation: dict[str, float] = {}
    for step in range(case.steps):
        if step == VALIDATED_STEP:
            batch = variant.batch(VALIDATION_BATCH)
            validation = engine.evaluate(share(batch, engine.grid)).by_task(TASKS)
        batch = variant.batch(step)
        result = engine.train_step(share(batch, engine.grid), LEARNING_RATE)
        steps.append(Step(result.losses.mean, result.losses.by_task(TASKS), result.grad_norm))
    return Curve(steps, validation, before, _padding(engine, case, variant.vocab))


def _padding(engine: Any, case: Case, vocab: int) -> list[Tensor]:
    """Return the padding rows of embedding and head on this rank."""
    rows = padded_vocab(vocab, case.tensor) // case.tensor
    real = min(rows, vocab - rows * engine.grid.tensor_rank)
    weights = model_weights(engine)
    return [weights[name][real:] for name in ("embedding.weight", "head.weight") if name in weights]


@once
def curves(processes: int, slow: bool) -> dict[Case, Curve]:
    """Return the slow or the other cases of one number of processes, from rank 0."""
    cases = [
        each
        for each in CASES + BF16_CASES
        if each.tensor * each.data == processes and (each in SLOW) == slow
    ]
    results = run_ranks(train_curves, processes, cases)
    for others in results[1:]:
        for native, reference in zip(results[0], others, strict=True):
            assert native.steps == reference.steps  # every rank knows the global figures
            assert native.validation == reference.validation
    last = results[-1]
    padded = [
        Curve(native.steps, native.validation, native.weights_before, reference.padding_after)
        for native, reference in zip(results[0], last, strict=True)
    ]
    return dict(zip(cases, padded, strict=True))


def curve(case: Case) -> Curve:
    return curves(case.tensor * case.data, case in SLOW)[case]


@cache
def plain_curve(name: str) -> Curve:
    """Train `plain_gpt` in the same way, from the first weights of the variant's 1 × 1 engine."""
    variant = VARIANTS[name]
    cases = [each for each in CASES if each.variant == name]
    assert (cases[0].tensor, cases[0].data) == (1, 1)
    weights = curve(cases[0]).weights_before
    shape = PlainShape(
        layers=MODEL["layers"],
        heads=MODEL["heads"],
        kv_heads=variant.model.get("kv_heads", MODEL["heads"]),
        layernorm=variant.model.get("norm") == "layernorm",
        gelu=variant.model.get("activation") == "gelu",
        geglu=variant.model.get("activation") == "geglu",
        zero_centered=variant.model.get("zero_centered_norms", False),
        multiplier=variant.model.get("embedding_multiplier", 1.0),
        softcap=variant.model.get("logit_softcap"),
        erf=variant.model.get("activation") == "gelu_erf",
        xielu=variant.model.get("activation") == "xielu",
        rotary_dim=variant.model.get("rotary_dim"),
        parallel=variant.model.get("parallel_residual", False),
        **ATTENTION.get(name, {}),
    )
    model = PlainGPT(weights, shape)
    optimizer = PlainAdamW(model.weights, clip=CLIP)
    steps = []
    validation: dict[str, float] = {}
    for step in range(max(each.steps for each in cases)):
        if step == VALIDATED_STEP:
            validation = _plain_losses(model, variant, VALIDATION_BATCH)[1]
        loss, by_task = _plain_losses(model, variant, step)
        minimized = loss + _plain_z_loss(model, variant, step)
        gradients = torch.autograd.grad(minimized, list(model.weights.values()))
        norm = optimizer.step(dict(zip(model.weights, gradients, strict=True)), LEARNING_RATE)
        steps.append(Step(float(loss.detach()), by_task, norm))
    return Curve(steps, validation, weights, [])


def _plain_losses(model: PlainGPT, variant: Variant, step: int) -> tuple[Tensor, dict[str, float]]:
    """Return the mean over all tokens of the batch with a target, and over those of each task."""
    batch = variant.batch(step)
    losses = model.losses(batch.inputs, batch.targets, batch.documents)
    real = batch.targets != IGNORED
    by_task = {}
    for number, task in enumerate(TASKS):
        mine = real & (batch.tasks == number).unsqueeze(1)
        if mine.any():
            by_task[task] = float(losses[mine].detach().mean())
    return losses[real].mean(), by_task


def _plain_z_loss(model: PlainGPT, variant: Variant, step: int) -> Tensor | float:
    """Return the mean over all tokens of the batch with a target; no loss that is reported has it
    in it."""
    if "z_loss" not in variant.model:
        return 0.0
    batch = variant.batch(step)
    squares = model.log_sums(model.logits(batch.inputs)).square()
    coefficient: float = variant.model["z_loss"]
    return coefficient * squares[batch.targets != IGNORED].mean()


def figures(curve: Curve, steps: int) -> dict[str, Tensor]:
    """Return every number of a curve's first steps, by kind, in float64."""
    first = curve.steps[:steps]
    return {
        "loss": _float64(each.loss for each in first),
        "gradient norm": _float64(each.grad_norm for each in first),
        **{
            f"loss of {task}": _float64(each.by_task.get(task, 1.0) for each in first)
            for task in TASKS
        },
        "validation": _float64(curve.validation[task] for task in TASKS),
    }


def _float64(values: Iterable[float]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def deviations(native: Curve, reference: Curve) -> dict[str, float]:
    """Return the largest relative difference of each kind of figure."""
    mine, expected = (figures(each, len(native.steps)) for each in (native, reference))
    return {
        kind: float(((mine[kind] - expected[kind]) / expected[kind]).abs().max()) for kind in mine
    }


@pytest.mark.distributed
@pytest.mark.parametrize("case", marked(CASES, SLOW), ids=str)
def test_curve_is_that_of_the_plain_model(case: Case) -> None:
    found = deviations(curve(case), plain_curve(case.variant))
    found["gradient norm"] /= CANCELLATION
    assert max(found.values()) < FP32, found


@pytest.mark.distributed
def test_the_compared_curve_is_one_that_falls() -> None:
    losses = [each.loss for each in plain_curve("base").steps]
    norms = [each.grad_norm for each in plain_curve("base").steps]
    assert len(losses) == STEPS
    assert losses[-1] < FALL * losses[0]
    assert min(norms) < CLIP < max(norms)  # some steps are clipped, some are not


@pytest.mark.distributed
@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16_curve_is_near_the_fp32_curve(case: Case) -> None:
    found = deviations(curve(case), plain_curve("base"))
    assert max(found.values()) < BF16_TOLERANCE, found


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case", marked([each for each in CASES if each.variant == "odd vocabulary"], SLOW), ids=str
)
def test_padding_rows_stay_zero(case: Case) -> None:
    rows = curve(case).padding_after
    assert len(rows) == 2
    for each in rows:
        assert each.shape[0] == (1 if case.tensor == 2 else 0)
        assert not each.any()
