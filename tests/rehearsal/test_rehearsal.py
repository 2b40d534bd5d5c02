"""The GPU path, rehearsed: the run's engine as one rank of many on a fake GPU.

No device mismatch (an error), no touch of a tensor under an unfinished collective, an optimizer
that really steps, a fixed list of host waits, and collectives and memory as the estimates say.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
from rehearsal_support import ALL_ACTIONS, LAYERS, needs_compiler, rehearse, run_file, sent, waits

pytestmark = needs_compiler

GPT2 = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}
GPT_NEOX = {
    "norm": "layernorm",
    "activation": "gelu_erf",
    "bias": True,
    "rotary_dim": 32,
    "parallel_residual": True,
}
# What is sent beside weights, gradients and activations: losses, counts of tokens, norms.
SCALAR_BYTES = 2_000
# Peak of live bytes over the estimate: above 1 by less than what `megaphase plan` keeps in reserve.
MEMORY = (0.9, 1.05)
UTILS, SYNC = "deepspeed/runtime/utils.py", "deepspeed/accelerator/cuda_accelerator.py"
PARTITIONS = "deepspeed/runtime/zero/partition_parameters.py"
ZERO_2, ZERO_3 = "deepspeed/runtime/zero/stage_1_and_2.py", "deepspeed/runtime/zero/stage3.py"
# Waits of the host in a training step and in each of its micro-batches, by ZeRO stage. All are
# DeepSpeed's: it reads the norm of the gradients to see whether it is finite and whether to clip
# (utils.py), and stages 2 and 3 wait for their streams in every backward pass.
WAITS = {
    0: ({}, {}),
    1: ({f"scalar read, {UTILS}": 2}, {}),
    2: (
        {f"scalar read, {UTILS}": 3, f"scalar read, {ZERO_2}": 1},
        {f"cuda.synchronize, {SYNC}": 1},
    ),
    3: (
        {f"scalar read, {UTILS}": 1, f"cuda.synchronize, {SYNC}": 1},
        {f"Stream.synchronize, {ZERO_3}": 1},
    ),
}

# DeepSpeed's other optimizer for stages 1 and 2.
WAITS_FP32 = WAITS | {
    1: ({f"scalar read, {UTILS}": 3, f"cuda.synchronize, {SYNC}": 1}, {}),
    2: ({f"scalar read, {UTILS}": 3}, {f"cuda.synchronize, {SYNC}": 1}),
}

LAYOUTS = [
    {"zero": zero, **layout}
    for zero, layout in product(
        range(4),
        [{}, {"tensor": 2}, {"tensor": 2, "overlap": False}, {"tensor": 8, "sequence": True}],
    )
]
OPTIONS: list[dict[str, Any]] = [
    {"model": {"activation_checkpointing": "selective"}},
    {"model": {"activation_checkpointing": "full"}},
    {"documents": True},
    {"documents": True, "tensor": 2, "sequence": True},
    {"documents": True, "model": {"activation_checkpointing": "full"}, "tensor": 2},
    {"model": {"dropout": 0.1}},
    {"model": {"dropout": 0.1}, "tensor": 2, "sequence": True},
    {"model": GPT2},
    {"model": GPT2 | {"activation_checkpointing": "selective"}, "tensor": 2, "sequence": True},
    {"model": {"kv_heads": 4}},
    {"model": {"kv_heads": 4}, "documents": True},
    {"model": {"tied_embeddings": True}},
    {"model": {"tied_embeddings": True}, "tensor": 2},
    {"model": {"head_dim": 192, "kv_heads": 4, "qkv_bias": True}},
    {"model": {"head_dim": 64, "qkv_bias": True}, "tensor": 2, "sequence": True},
    {"model": {"qk_norm": "head"}, "tensor": 2},
    {"model": {"qk_norm": "head", "kv_heads": 4}, "tensor": 2, "sequence": True},
    {"model": {"qk_norm": "projection"}, "tensor": 2},
    {"model": {"norm_position": "after"}},
    {"model": {"norm_position": "both"}, "tensor": 2, "sequence": True},
    {"model": {"norm_position": "after", "activation_checkpointing": "selective"}, "tensor": 2},
    {"model": {"rotary_scaling": {"type": "linear", "factor": 4}}},
    {
        "model": {
            "activation": "geglu",
            "zero_centered_norms": True,
            "qk_norm": "head",
            "embedding_multiplier": 32.0,
            "logit_softcap": 30.0,
            "z_loss": 1e-4,
        }
    },
    {"model": {"activation": "geglu", "logit_softcap": 30.0}, "kernels": "eager", "tensor": 2},
    {"model": {"sliding_window": 512}},
    {"model": {"sliding_window": 512, "attention_pattern": ["sliding", "full"], "kv_heads": 4}},
    {"model": {"sliding_window": 512}, "documents": True, "tensor": 2, "sequence": True},
    {"model": {"sliding_window": 512, "activation_checkpointing": "full"}, "tensor": 2},
    {"model": {"sliding_window": 512}, "precision": "fp32"},
    {"faults": {"skip_spikes": {"deviations": 6.0}}},
    {"faults": {"skip_spikes": {"deviations": 6.0}}, "precision": "fp32", "tensor": 2},
    {"average": {"kind": "ema", "decay": 0.9}},
    {"average": {"kind": "uniform"}, "precision": "fp32", "tensor": 2},
    {"model": {"attention_softcap": 50, "attention_scale": 0.05, "kv_heads": 4}},
    {"model": {"attention_softcap": 50, "sliding_window": 512}, "documents": True, "tensor": 2},
    {"model": {"activation": "xielu"}},
    {"model": {"activation": "xielu", "activation_checkpointing": "selective"}, "tensor": 2},
    {"model": {"activation": "xielu"}, "tensor": 2, "sequence": True, "kernels": "eager"},
    {"model": GPT_NEOX, "tensor": 2, "sequence": True},
    {"model": GPT_NEOX | {"activation_checkpointing": "selective"}},
    {"model": GPT_NEOX | {"activation_checkpointing": "full"}, "tensor": 2},
    {"kernels": "eager"},
    {"precision": "fp32"},
    {"precision": "fp32", "documents": True},
    {"precision": "fp32", "model": {"kv_heads": 4}},
    {"optimizer": {"clip": 0}},
    {"micro_batches": 1},
    {"micro": 1, "micro_batches": 4},
]
OFFLOADED = [
    {"zero": 1, "offload": "cpu"},
    {"zero": 2, "offload": "cpu"},
    {"zero": 3, "offload": "cpu"},
    {"zero": 3, "offload": "cpu", "offload_parameters": "cpu"},
]
KEPT = [{"zero": 3, "keep_gathered": 1.0}, {"zero": 3, "keep_gathered": 0.5, "tensor": 2}]
SECONDARY = [{"zero": 3, "secondary_partition": 8}]
QUICK = [
    {"zero": 0, "tensor": 2, "sequence": True},
    {"zero": 3, "tensor": 2, "sequence": True, "documents": True},
]
MATRIX = [
    *LAYOUTS,
    *({"zero": zero} | options for zero in (0, 1, 3) for options in OPTIONS),
    *OFFLOADED,
    *KEPT,
    *SECONDARY,
]


def check(case: dict[str, Any]) -> dict[str, Any]:
    """Rehearse all actions of a case, and check what holds for every case."""
    answer = rehearse(run_file(**case), actions=ALL_ACTIONS)
    train = answer["reports"]["train"]
    assert answer["applied"]
    if case.get("offload", "none") == "none":
        # One call for each group of parameters: with weight decay, and without.
        assert train["kernels"]["_fused_adamw_"] == 2
    else:
        assert answer["optimizer_steps"] == 0  # the reset comes last
    for report in answer["reports"].values():
        assert report["conflicts"] == []
        assert report["unfinished"] == 0
    return answer


def check_traffic(case: dict[str, Any], answer: dict[str, Any]) -> None:
    """A rank sends what `megaphase plan` says, to the byte but for scalars."""
    train, estimated = answer["reports"]["train"], answer["estimates"]["sent"]
    for group in estimated:
        beyond = sent(train, group) - estimated[group]
        assert -1 <= beyond <= SCALAR_BYTES, (group, beyond, estimated[group])


def check_waits(case: dict[str, Any], answer: dict[str, Any]) -> None:
    found = waits(answer["reports"]["train"])
    if case.get("offload", "none") != "none":
        assert all("deepspeed" in each for each in found)
        return
    by_stage = WAITS_FP32 if case.get("precision") == "fp32" else WAITS
    step, micro_batch = by_stage[case["zero"]]
    expected = Counter(step)
    for _ in range(case.get("micro_batches", 2)):
        expected.update(micro_batch)
    if "secondary_partition" in case:
        # Each parameter's, when the copy of it is made.
        expected[f"Stream.synchronize, {PARTITIONS}"] = 6 * LAYERS + 3
    assert found == expected


def check_memory(answer: dict[str, Any]) -> None:
    low, high = MEMORY
    estimated = answer["estimates"]["peak_bytes"]
    assert low < answer["reports"]["train"]["peak_bytes"] / estimated < high


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_main_layouts(case: dict[str, Any]) -> None:
    answer = check(case)
    check_traffic(case, answer)
    check_waits(case, answer)
    check_memory(answer)


@pytest.mark.rehearse
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_every_layout_and_option(case: dict[str, Any]) -> None:
    answer = check(case)
    check_memory(answer)
    if case.get("precision") != "fp32":  # no card states how fast fp32 is
        check_traffic(case, answer)
    check_waits(case, answer)


def test_generation_waits_once_for_eight_tokens() -> None:
    answer = rehearse(run_file(processes=1), processes=1, actions=("generate",))
    report = answer["reports"]["generate"]
    assert waits(report) == {
        "copy to the host, decoding/sampling.py": 3,  # of 24 tokens
        "scalar read, decoding/decoder.py": 1,  # whether the first logits are finite
    }
    assert not any("cudnn" in name for name in report["kernels"])


@pytest.mark.rehearse
@pytest.mark.parametrize("rank", [5, 15])
def test_other_ranks_do_the_same(rank: int) -> None:
    run = run_file(zero=1, tensor=2, sequence=True)
    reports = [rehearse(run, rank=each)["reports"]["train"] for each in (0, rank)]
    for report in reports:
        # Replicated parameters count once in the norm, on the first tensor-parallel rank.
        report["kernels"].pop("linalg_vector_norm")
    assert reports[0]["kernels"] == reports[1]["kernels"]
    assert reports[0]["collectives"] == reports[1]["collectives"]


@pytest.mark.rehearse
@pytest.mark.parametrize("name", ["adafactor", "lion", "muon"])
@pytest.mark.parametrize(
    "layout",
    [
        {"zero": 0, "tensor": 2},
        {"zero": 1},
        {"zero": 2, "offload": "cpu"},
        {"zero": 3, "tensor": 2},
    ],
    ids=str,
)
def test_every_optimizer(name: str, layout: dict[str, Any]) -> None:
    answer = rehearse(run_file(optimizer={"name": name}, **layout), actions=ALL_ACTIONS)
    assert answer["applied"]
    assert answer["optimizer_steps"] == 0  # the reset comes last
    for report in answer["reports"].values():
        assert report["conflicts"] == []
        assert report["unfinished"] == 0
    found = waits(answer["reports"]["train"])
    if layout.get("offload", "none") == "none":
        assert not any("optim/" in each for each in found), found
    check_memory(answer)
