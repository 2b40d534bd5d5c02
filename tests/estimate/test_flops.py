"""GPUs, the hardware of a run file, MFU, and the times that `megaphase plan` shows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from engine_support import run_config
from plan_support import FakeTokenizer, phase, random_lengths, write_corpus, write_run
from rich.console import Console
from typer.testing import CliRunner

from megaphase.callbacks.throughput import device_peak_flops, missing_peak
from megaphase.estimate.config import HardwareConfig
from megaphase.estimate.gpu_specs import CARDS, card_of_device
from megaphase.estimate.hardware import Hardware, hardware_of, peak_flops
from megaphase.estimate.memory import estimate
from megaphase.estimate.memory_table import (
    in_unit,
    memory_sentences,
    memory_summary,
    memory_unit,
    memory_warnings,
)
from megaphase.estimate.setup import PhaseSetup, Setup
from megaphase.estimate.step_time import step_time
from megaphase.estimate.step_time_table import (
    WIDE,
    layouts_table,
    quickest,
    speed_sentences,
    speed_summary,
    time_sentence,
)
from megaphase.estimate.suggestions import GB
from megaphase.model.parameters import parameter_count
from megaphase.model.shape import GPTShape
from megaphase.plan.commands import plan_app
from megaphase.utils.errors import InputError


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("AMD Instinct MI300X", "mi300x"),
        # Other GPUs whose names contain the name of one in the table.
        ("NVIDIA A10G", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("Tesla V100-SXM2-32GB", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_the_card_that_a_device_s_name_means(device, card):
    assert card_of_device(device) == (CARDS[card] if card else None)


def config_with(precision="bf16", **hardware):
    config = run_config(precision=precision)
    return config.model_copy(update={"hardware": HardwareConfig(**hardware)})


def test_the_run_file_goes_before_the_table():
    card = hardware_of(config_with(card="a100-80gb"))
    assert (card.title, card.peak_flops, card.memory_bandwidth) == (
        "A100 SXM 80 GB",
        312e12,
        2.039e12,
    )
    assert (card.node_link, card.network, card.gpus_per_node) == (300e9, 25e9, 8)
    own = hardware_of(
        config_with(
            card="a100-80gb",
            peak_tflops=100,
            efficiency=0.5,
            memory_gb_per_s=1000,
            gpus_per_node=4,
            node_link_gb_per_s=200,
            network_gbit_per_s=80,
        )
    )
    assert own == Hardware("A100 SXM 80 GB", False, 100e12, 0.5, 1e12, 4, 200e9, 10e9, 1.0)
    assert hardware_of(config_with(card="a100-80gb"), "l4").title == "L4"


def test_h100_is_assumed_where_nothing_is_said():
    usual = hardware_of(config_with())
    assert (usual.title, usual.assumed) == ("H100 SXM", True)
    assert not hardware_of(config_with(efficiency=0.5)).assumed
    assert not hardware_of(config_with(), "h100-sxm").assumed


def test_the_table_says_nothing_about_fp32():
    assert hardware_of(config_with("fp32")) is None
    assert hardware_of(config_with("fp32", peak_tflops=60)).peak_flops == 60e12


def test_an_unknown_card_is_refused():
    config = config_with(card="h100")
    with pytest.raises(InputError) as error:
        hardware_of(config)
    assert str(error.value) == (
        f"{config.path}: hardware.card: no card 'h100' in the table; did you mean 'h100-sxm'? (for "
        "another give hardware.peak_tflops)"
    )
    with pytest.raises(InputError, match=r"^--card: no card 'gtx'"):
        hardware_of(config_with(), "gtx")


def test_what_mfu_is_measured_against():
    assert peak_flops(config_with(), "NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops(config_with(peak_tflops=800), "NVIDIA H100 80GB HBM3") == 800e12
    # The actual GPU rather than the planned one, unless it is not known.
    assert peak_flops(config_with(card="l4"), "NVIDIA H100 80GB HBM3") == 989.5e12
    assert peak_flops(config_with(card="l4"), "NVIDIA X1") == 121e12
    assert peak_flops(config_with(), "NVIDIA X1") is None
    assert peak_flops(config_with("fp32"), "NVIDIA H100 80GB HBM3") is None
    assert peak_flops(config_with("fp32", peak_tflops=0.2), None) == 0.2e12
    assert peak_flops(config_with(card="l4"), None) is None


def test_a_run_says_what_would_give_mfu(monkeypatch):
    monkeypatch.setattr("megaphase.callbacks.throughput.device", lambda: torch.device("cpu"))
    assert missing_peak(config_with()) is None
    assert device_peak_flops(config_with(peak_tflops=2)) == 2e12
    monkeypatch.setattr("megaphase.callbacks.throughput.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X1")
    assert missing_peak(config_with()) == (
        "No MFU: the bf16 peak of NVIDIA X1 is not in the table of cards; hardware.peak_tflops "
        "gives it"
    )
    assert missing_peak(config_with(peak_tflops=2)) is None
    assert device_peak_flops(config_with()) is None


SHAPE = GPTShape(
    vocab=64_000, seq_len=4096, layers=40, hidden=5120, heads=40, kv_heads=40, ffn=13696
)
RUN = Setup(SHAPE, 2, 32, 1, True, True, micro=1, accumulation=32)
H100 = Hardware("H100 SXM", True, 989.5e12, 0.65, 3350e9, 8, 450e9, 50e9)
PHASES = [("pretrain", 60_000), ("joint", 5000)]


def phases(setup: Setup) -> list[tuple[str, list[tuple[Setup, int]]]]:
    return [(name, [(setup, steps)]) for name, steps in PHASES]


def test_the_summary_adds_up():
    memory, speed = (
        memory_summary([PhaseSetup("only", RUN)], 80.0),
        speed_summary(RUN, H100, phases(RUN)),
    )
    keys = ("tensor", "data", "zero")
    for one, other in zip(memory["layouts"], speed["layouts"], strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]
        assert other["step_seconds"] == sum(other["seconds_by"].values())
    own = speed["layouts"][0]
    assert [each["seconds"] for each in speed["phases"]] == [
        steps * own["step_seconds"] for _, steps in PHASES
    ]
    assert speed["seconds"] == pytest.approx(65_000 * own["step_seconds"])
    best = speed["layouts"][quickest(memory, speed)]["step_seconds"]
    fitting = [
        time["step_seconds"]
        for figures, time in zip(memory["layouts"], speed["layouts"], strict=True)
        if figures["fits"]
    ]
    assert best == min(fitting) < max(fitting)


def test_the_steps_of_a_ramp_take_their_own_time():
    stages = [(RUN.with_batch(samples), 100) for samples in (256, 512, 1024)]
    speed = speed_summary(RUN, H100, [("ramp", stages)])
    assert RUN.samples == 1024
    expected = sum(100 * step_time(setup, H100).seconds for setup, _ in stages)
    assert speed["seconds"] == pytest.approx(expected)
    assert speed["seconds"] < 0.6 * 300 * speed["layouts"][0]["step_seconds"]


def test_the_sentences():
    memory, speed = (
        memory_summary([PhaseSetup("only", RUN)], 80.0),
        speed_summary(RUN, H100, phases(RUN)),
    )
    step, rate, expected, best = speed_sentences(memory, speed)
    own = speed["layouts"][0]
    assert step.startswith(
        f"Step, estimated (H100 SXM, assumed): {own['step_seconds']:.2f} s = matrices "
    )
    assert "optimizer" not in step  # too little to be named
    days = speed["seconds"] / 86400
    assert (
        f"tokens/s, MFU {own['mfu']:.0%}; without validation and saving {days:.1f} days = " in rate
    )
    assert rate.endswith(" hours")
    assert rate.startswith(f"Speed: at best {own['tokens_per_second']:,.0f} tokens/s")
    assert expected.startswith(
        f"To be expected: {own['tokens_per_second'] * 2 / 3:,.0f} tokens/s, MFU "
        f"{own['mfu'] * 2 / 3:.0%}; {days * 1.5:.1f} days (two thirds of the best, until "
    )
    assert best.startswith("Quickest layout that fits: tensor 1 × data 64, ZeRO 3, ")


def test_a_measured_efficiency_is_what_to_expect():
    measured = replace(H100, efficiency=0.5, expected=1.0)
    speed = speed_summary(RUN, measured, phases(RUN))
    memory = memory_summary([PhaseSetup("only", RUN)], 80.0)
    _, rate, _ = speed_sentences(memory, speed)
    assert rate.startswith(f"Speed: {speed['layouts'][0]['tokens_per_second']:,.0f} tokens/s")
    assert time_sentence(measured, phases(RUN)) == (
        "Time, estimated (H100 SXM, assumed), without validation and saving: "
        f"{speed['seconds'] / 86400:.1f} days"
    )
    days = speed_summary(RUN, H100, phases(RUN))["seconds"] / 86400
    assert time_sentence(H100, phases(RUN)).endswith(
        f"{days:.1f} days at best, {1.5 * days:.1f} days to be expected"
    )


def test_no_other_layout_is_named_where_the_own_one_is_good():
    memory, speed = (
        memory_summary([PhaseSetup("only", RUN)], 80.0),
        speed_summary(RUN, H100, phases(RUN)[:1]),
    )
    at = quickest(memory, speed)
    for summary in (memory, speed):
        summary["layouts"].insert(0, summary["layouts"].pop(at))
    assert len(speed_sentences(memory, speed)) == 3
    assert "=" not in speed_sentences(memory, speed)[1]  # a single phase


def test_there_is_nothing_quickest_where_nothing_fits():
    memory, speed = (
        memory_summary([PhaseSetup("only", RUN)], 1.0),
        speed_summary(RUN, H100, phases(RUN)),
    )
    assert quickest(memory, speed) is None
    assert len(speed_sentences(memory, speed)) == 3


def test_what_is_gathered_too_often_is_named_where_it_would_fit():
    few_layers = replace(SHAPE, layers=8)
    run = Setup(few_layers, 1, 64, 3, False, True, micro=1, accumulation=16)
    slow = replace(H100, network=5e9)

    def last(setup: Setup, card_gb: float = 80.0) -> str:
        return speed_sentences(
            memory_summary([PhaseSetup("only", setup)], card_gb),
            speed_summary(setup, slow, phases(setup)),
        )[-1]

    kept = replace(run, keep_gathered=1.0)
    saved = step_time(run, slow).seconds - step_time(kept, slow).seconds
    more = (estimate(kept).total - estimate(run).total) / GB
    line = f"keep_gathered: 1.0 would save {saved:.2f} s a step for {more:.1f} GB"
    assert last(run) == line
    assert saved > 1
    for other in (kept, replace(run, zero=2)):
        assert not last(other).startswith("keep_gathered")
    assert not last(run, 12.0).startswith("keep_gathered")  # not enough for all of them
    quick = speed_sentences(
        memory_summary([PhaseSetup("only", run)], 80.0), speed_summary(run, H100, phases(run))
    )
    assert not quick[-1].startswith("keep_gathered")  # communication overlaps with the products


def test_a_second_partition_is_named_where_it_would_fit():
    run = Setup(replace(SHAPE, layers=8), 1, 64, 3, False, True, micro=1, accumulation=16)
    slow = replace(H100, network=5e9)

    def named(setup: Setup, card_gb: float = 80.0, hardware: Hardware = slow) -> list[str]:
        speed = speed_summary(setup, hardware, phases(setup))
        sentences = speed_sentences(memory_summary([PhaseSetup("only", setup)], card_gb), speed)
        return [each for each in sentences if each.startswith("secondary_partition")]

    second = replace(run, secondary=8)
    saved = step_time(run, slow).seconds - step_time(second, slow).seconds
    more = (estimate(second).total - estimate(run).total) / GB
    line = f"secondary_partition: 8 would save {saved:.2f} s a step for {more:.1f} GB"
    assert named(run) == [line]
    assert saved > 1
    assert more == pytest.approx(parameter_count(run.shape) / 8 * 2 / GB, rel=1e-3)
    for other in (second, replace(run, zero=2), run.with_processes(2, 32), replace(run, data=8)):
        assert named(other) == []
    assert named(run, estimate(second).total / GB) == []  # nothing is left in reserve
    assert named(run, hardware=H100) == []


@pytest.mark.parametrize("width", [80, WIDE])
def test_the_table_loses_nothing_in_its_width(width):
    memory, speed = (
        memory_summary([PhaseSetup("only", RUN)], 80.0),
        speed_summary(RUN, H100, phases(RUN)),
    )
    console = Console(width=width, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(layouts_table(memory, speed, width=width))
    text = capture.get()
    assert "…" not in text
    assert ("activations" in text) == (width == WIDE)
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert rows[0][:3] == ["2", "32", "1"]
    assert sum(row[-1] == "quickest" for row in rows) == 1


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Run `megaphase plan` for a small run of two phases; return the result."""
    monkeypatch.setattr("megaphase.tokenizer.Tokenizer.load", lambda directory: FakeTokenizer())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    write_corpus(tmp_path / "en", random_lengths(60, 30, 0), seed=0)
    phases = [phase(name, 10, {"rates": {"en": 1.0}}) for name in ("one", "two")]
    config = write_run(tmp_path, ["en"], phases=phases)
    return lambda *words: CliRunner().invoke(plan_app, [str(config.path), *map(str, words)])


def test_the_command_estimates_the_step(plan):
    lines = plan("--card", "l4").stdout.splitlines()
    [step] = [line for line in lines if line.startswith("Step")]
    assert step.startswith("Step, estimated (L4): ")
    assert any(line.startswith("Speed: ") for line in lines)


def test_the_card_s_memory_is_what_has_to_suffice(plan):
    for words, gb in [((), 80), (("--card", "l4"), 24), (("--card", "l4", "--memory", 5), 5)]:
        assert json.loads(plan("--json", *words).stdout)["memory"]["card_gb"] == gb


def test_the_json_holds_the_time(plan):
    speed = json.loads(plan("--json", "--processes", 2, "hardware.card=b200").stdout)["speed"]
    assert (speed["card"], speed["card_assumed"]) == ("B200", False)
    assert [each["name"] for each in speed["phases"]] == ["one", "two"]
    own = speed["layouts"][0]
    assert speed["seconds"] == pytest.approx(20 * own["step_seconds"])
    assert own["tokens_per_second"] == pytest.approx(4 * 8 / own["step_seconds"])
    assert own["sent_bytes_by"].keys() == {"tensor", "data"}


def test_little_memory_is_shown_in_mb(plan):
    needed = json.loads(plan("--json").stdout)["memory"]["layouts"][0]["bytes"]
    assert needed < 0.1 * GB
    said = plan("--layouts").stdout
    assert f"): {needed / (1 << 20):.1f} MB = " in said
    assert ": MB on each" in " ".join(said.split())
    assert memory_unit(0.1 * GB) == "GB"
    assert in_unit(0.1 * GB, "GB") == "0.1"


def test_the_command_says_why_there_is_no_time(plan):
    output = plan("precision=fp32", "--layouts").stdout
    assert (
        "No estimate of time: it is made for GPUs that compute in bf16, and this run is" in output
    )
    assert "MFU" not in output
    assert json.loads(plan("precision=fp32", "--json").stdout)["speed"] is None


def test_the_command_refuses_an_unknown_card(plan, tmp_path):
    error = plan("--card", "h100-sx").exception
    assert isinstance(error, InputError)
    assert str(error).startswith("--card: no card 'h100-sx' in the table; did you mean 'h100-sxm'?")
    assert not (tmp_path / "run").exists()


def test_phases_of_other_lengths_have_their_own_memory_and_time():
    long = replace(RUN, shape=replace(SHAPE, seq_len=4 * SHAPE.seq_len))
    setups = [PhaseSetup("pretrain", RUN), PhaseSetup("long", long), PhaseSetup("last", RUN)]
    stages = [(name, [(setup, 100)]) for name, setup in setups]
    memory, speed = memory_summary(setups, 80.0), speed_summary(long, H100, stages)
    assert memory["layouts"][0]["bytes"] == estimate(long).total
    found = [(each["name"], each["seq_len"], each["bytes"]) for each in memory["phases"]]
    assert found == [(name, each.seq_len, estimate(each).total) for name, each in setups]
    seconds = [100 * step_time(each, H100).seconds for _, each in setups]
    assert [each["seconds"] for each in speed["phases"]] == seconds
    assert speed["seconds"] == sum(seconds)
    said = [*memory_sentences(memory), *speed_sentences(memory, speed)]
    assert said[0].startswith("Memory per GPU (tensor 2 × data 32, ZeRO 1, phase long): ")
    assert said[1].startswith("Memory of the phases: pretrain ")
    [step] = [each for each in said if each.startswith("Step, estimated")]
    assert ", phase long): " in step
    [steps] = [each for each in said if each.startswith("Steps of the phases")]
    assert [part.split()[0] for part in steps.split(": ", 1)[1].split("; ")] == [
        "pretrain", "long", "last",
    ]  # fmt: skip
    [too_small] = memory_warnings(memory_summary(setups, 1.0))
    assert too_small.startswith("Phase long does not fit 1 GB: ")
