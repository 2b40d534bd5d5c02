"""What torch.compile makes of the formulas for an H100: assembled and counted, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from assembled_kernels import Formula, formulas
from rehearsal_support import VOCAB, needs_compiler, needs_triton, run_file

from megaphase.rehearsal.fake_device import CARD

pytestmark = [needs_compiler, needs_triton]

# Launches of each formula: Triton kernels, and operators of torch. Where both gradients of a norm
# take one pass, torch adds up the sums of its programs, and a last kernel rounds them. Those of
# xIELU's two scalars are summed with the gradient of its input, and their parts by a kernel each.
IN_ONE_PASS, BY_HALVES, BY_GROUPS = (2, 1), (3, 2), (3, 0)
LAUNCHES = {
    "rms_norm._norm": (1, 0),
    "rms_norm._add_and_norm": (1, 0),
    "rms_norm._gradients_in_one_pass": IN_ONE_PASS,
    "rms_norm._gradients_by_halves": BY_HALVES,
    "rms_norm._gradients": BY_GROUPS,
    "rotary._rotate_heads": (1, 0),
    "rotary._rotate_back": (1, 0),
    "gated._swiglu": (1, 0),
    "gated._swiglu_gradient": (1, 0),
    "gated._geglu": (1, 0),
    "gated._geglu_gradient": (1, 0),
    "xielu._xielu": (1, 0),
    "xielu._gradients": (3, 0),
    "cross_entropy._top": (1, 0),
    "cross_entropy._sums": (1, 0),
    "cross_entropy._gradient_by_comparison": (1, 0),
}
# Bytes read and written, as a multiple of the fewest possible. The sums of a norm's programs are a
# sixteenth of what it reads in fp32, written and read; a pass for each gradient reads twice.
MOST_BYTES = {
    "rms_norm._gradients_in_one_pass": 1.09,
    "rms_norm._gradients_by_halves": 1.09,
    "rms_norm._gradients": 1.70,
}
ONE_PASS, ROUNDED = "rms_norm._gradients_in_one_pass", 1.002
LOSS = {name for name in LAUNCHES if name.startswith("cross_entropy.")}
ROTARY = {"rotary._rotate_heads", "rotary._rotate_back"}
BLOCK = ROTARY | {"gated._swiglu", "gated._swiglu_gradient"}
NORM = {"rms_norm._norm", "rms_norm._add_and_norm"}


def assembled(run: dict[str, Any], processes: int = 1) -> list[Formula]:
    """The formulas of a run, from a process of their own."""
    case = {"run": run, "vocab": VOCAB, "processes": processes}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "assembled_kernels"],
        input=json.dumps(case),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return formulas(json.loads(done.stdout))


def check(found: list[Formula], expected: set[str]) -> None:
    assert {formula.name for formula in found} == expected
    for formula in found:
        what = f"{formula.name} of {formula.shapes}: {formula.launches}"
        compiled = [launch for launch in formula.launches if launch.assemblies]
        operators = len(formula.launches) - len(compiled)
        launches = LAUNCHES[formula.name]
        if formula.name == ONE_PASS and operators == len(compiled) == 1:
            launches = (1, 1)  # gradients in fp32 are not rounded
        assert (len(compiled), operators) == launches, what
        moved = sum(launch.read + launch.written for launch in formula.launches)
        floor = formula.floor_read + formula.floor_written
        assert moved <= MOST_BYTES.get(formula.name, ROUNDED) * floor, (moved / floor, what)
        for launch in compiled:
            # Every rank sums in the same order.
            assert len(launch.assemblies) == 1 or not launch.reduces, what
            for assembly in launch.assemblies:
                assert assembly.spilled == 0, what
                assert assembly.shared_memory <= CARD.shared_memory_per_block_optin, what


def in_words(value: Any) -> str:
    """Name a case; a set's own order differs between processes."""
    return ", ".join(sorted(value)) if isinstance(value, set) else str(value)


@pytest.mark.slow
def test_each_formula_takes_as_few_bytes_as_can_be() -> None:
    run = run_file(processes=1, model={"layers": 1})
    check(assembled(run), NORM | BLOCK | LOSS | {ONE_PASS})


@pytest.mark.rehearse
@pytest.mark.parametrize(
    ("run", "expected"),
    [
        ({"model": {"preset": "gpt-125m", "dropout": 0.1}, "documents": True}, {ONE_PASS}),
        ({"model": {"preset": "gpt-2.7b", "seq_len": 4096}}, {ONE_PASS}),
        # As many tokens as the hidden size.
        (
            {"micro": 1, "model": {"preset": "gpt-6.7b", "seq_len": 4096}},
            {"rms_norm._gradients_by_halves"},
        ),
        ({"micro": 1}, {"rms_norm._gradients"}),
        (
            {
                "micro": 1,
                "model": {
                    "preset": "gpt-13b",
                    "seq_len": 4096,
                    "activation_checkpointing": "selective",
                },
            },
            {ONE_PASS},
        ),
        # In fp32, rows of the gradient with the residual stream's do not fit the shared memory.
        (
            {"precision": "fp32", "micro": 1, "model": {"preset": "gpt-13b", "seq_len": 4096}},
            {ONE_PASS, "rms_norm._gradients"},
        ),
        ({"precision": "fp32"}, {ONE_PASS}),
    ],
    ids=in_words,
)
def test_at_every_size(run: dict[str, Any], expected: set[str]) -> None:
    run["model"] = {"layers": 1} | run.get("model", {})
    check(assembled(run_file(processes=1, **run)), NORM | BLOCK | LOSS | expected)


@pytest.mark.rehearse
@pytest.mark.parametrize("sequence", [False, True])
def test_on_tensor_parallel_ranks(sequence: bool) -> None:
    model = {"layers": 1, "preset": "gpt-13b", "seq_len": 4096}
    run = run_file(processes=8, tensor=8, zero=1, sequence=sequence, model=model)
    # Sequence-parallel ranks hold few rows of each half of a micro-batch.
    gradients = {ONE_PASS, "rms_norm._gradients"} if sequence else {ONE_PASS}
    check(assembled(run, 8), NORM | BLOCK | LOSS | gradients)


@pytest.mark.rehearse
@pytest.mark.parametrize(
    ("model", "activation"),
    [
        (
            {"activation": "geglu", "zero_centered_norms": True, "logit_softcap": 30.0},
            {"gated._geglu", "gated._geglu_gradient"},
        ),
        ({"activation": "xielu"}, {"xielu._xielu", "xielu._gradients"}),
    ],
    ids=in_words,
)
def test_other_formulas_of_norms_activations_and_loss(
    model: dict[str, Any], activation: set[str]
) -> None:
    found = assembled(run_file(processes=1, model={"layers": 1} | model))
    check(found, NORM | ROTARY | LOSS | {ONE_PASS} | activation)


@pytest.mark.rehearse
def test_a_model_of_other_layers_compiles_its_loss_alone() -> None:
    other = {"norm": "layernorm", "position": "learned", "activation": "gelu", "bias": True}
    check(assembled(run_file(processes=1, model={"layers": 1} | other)), LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [128, 256])
def test_capped_attention_is_one_kernel_without_a_mask_of_all_pairs(head_dim: int) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "assembled_attention", str(head_dim)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    steps = json.loads(done.stdout)
    names = {step: [each["name"] for each in found] for step, found in steps.items()}
    assert [name.startswith("triton_tem_fused_flex") for name in names["forward"]] == [True]
    # The sums over the keys of output times gradient, and the gradients.
    assert len(names["backward"]) == 2
    assert names["backward"][1].startswith("triton_tem_fused_flex_attention_backward")
    for launch in steps["forward"] + steps["backward"]:
        for way in launch["assemblies"]:
            assert way["shared_memory"] <= CARD.shared_memory_per_block_optin
    # Blocks of 128 by 128 tokens: documents are read, and a number for each block is written.
    assert sum(each["written"] for each in steps["mask"]) < 2048 * 2048 / 16
