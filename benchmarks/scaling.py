"""Make the tables of docs/scaling.md: layouts of two large runs, and estimates of published runs.

    python benchmarks/scaling.py                          prints them
    python benchmarks/scaling.py --write docs/scaling.md  updates them in the page

Needs neither a GPU nor corpora: it reads the run files in examples/scaling and computes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from megaphase.config.load import load_run_file
from megaphase.estimate.gpu_specs import CARDS
from megaphase.estimate.hardware import Hardware, hardware_of
from megaphase.estimate.memory import estimate
from megaphase.estimate.setup import Setup, setup_of
from megaphase.estimate.step_time import StepTime, step_time
from megaphase.estimate.suggestions import GB, fits, layouts
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape

EXAMPLES = Path(__file__).parent.parent / "examples" / "scaling"
RUNS = {"13b-64": 64, "70b-512": 512}
CARD = CARDS["h100-sxm"]
MICRO_BATCHES = (1, 2, 4)
CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Published:
    """A published measurement on H100 SXM with fully sharded data parallelism.

    tokens_per_second: per GPU.
    """

    source: str
    shape: GPTShape
    gpus: int
    micro: int
    accumulation: int
    tokens_per_second: float


def _mpt(
    layers: int, hidden: int, heads: int, seq_len: int, *, checkpointing: str = "none"
) -> GPTShape:
    """MPT (its ALiBi, which has no weights, is modelled as rotary)."""
    return GPTShape(
        vocab=50_368,
        seq_len=seq_len,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        ffn=4 * hidden,
        norm="layernorm",
        activation="gelu",
        tied_embeddings=True,
        activation_checkpointing="full" if checkpointing == "full" else "none",
    )


LLAMA_8B = GPTShape(
    vocab=128_256, seq_len=8192, layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336
)
# llm-foundry: scripts/train/benchmarking/README.md, "H100 80GB BF16", whose sizes are in
# scripts/train/yamls. torchtitan: benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3, with
# torch.compile; there the GPUs were limited to 500 W and some of the activations were recomputed,
# which this model cannot represent.
PUBLISHED = [
    Published("llm-foundry 1B", _mpt(24, 2048, 16, 2048), 8, 14, 1, 45_455),
    Published("llm-foundry 3B", _mpt(32, 2560, 32, 2048), 64, 6, 3, 22_525),
    Published("llm-foundry 7B", _mpt(32, 4096, 32, 2048), 8, 6, 1, 10_643),
    Published("llm-foundry 7B", _mpt(32, 4096, 32, 4096, checkpointing="full"), 8, 16, 2, 8_611),
    Published("llm-foundry 13B", _mpt(40, 5120, 40, 2048), 64, 2, 1, 4_800),
    Published("llm-foundry 13B", _mpt(40, 5120, 40, 4096, checkpointing="full"), 8, 10, 3, 4_717),
    Published("llm-foundry 30B", _mpt(48, 7168, 56, 2048, checkpointing="full"), 32, 14, 3, 2_308),
    Published("llm-foundry 70B", _mpt(80, 8192, 64, 2048, checkpointing="full"), 64, 8, 4, 1_039),
    Published("torchtitan 8B", LLAMA_8B, 8, 2, 1, 6_667),
    Published("torchtitan 8B", LLAMA_8B, 128, 2, 1, 6_514),
]


def run_setup(name: str) -> tuple[Setup, Hardware]:
    """Return the setup of a run file in examples/scaling, and its GPUs."""
    config = load_run_file(EXAMPLES / f"{name}.yaml")
    hardware = hardware_of(config)
    assert config.model.vocab is not None
    assert hardware is not None
    shape = build_shape(config, config.model.vocab)
    return setup_of(config, shape, RUNS[name], "cuda"), hardware


def best_variant(layout: Setup, hardware: Hardware) -> Setup:
    """Return the fastest of a layout's micro-batches and recomputation modes that fits the GPU.

    If none fits, return the one that needs the least memory.
    """
    variants = sorted(_variants(layout), key=lambda each: step_time(each, hardware).seconds)
    fitting = (variant for variant in variants if fits(variant, CARD.memory_gb))
    return next(fitting, None) or min(variants, key=lambda each: estimate(each).total)


def _variants(layout: Setup) -> Iterator[Setup]:
    whole = layout.micro * layout.accumulation
    for micro in MICRO_BATCHES:
        if whole % micro == 0:
            for checkpointing in CHECKPOINTING:
                shape = replace(layout.shape, activation_checkpointing=checkpointing)
                yield replace(layout.with_micro(micro), shape=shape)


def layouts_page(name: str) -> str:
    """Return the table of a run's layouts with their best variants."""
    own, hardware = run_setup(name)
    rows = [
        "| layout, ZeRO | micro | again | GB | step | compute | tensor | data | sent | MFU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for layout in sorted(layouts(own.with_micro(1)), key=lambda each: (each.tensor, each.zero)):
        if layout.zero > 0:
            variant = best_variant(replace(layout, sequence=layout.tensor > 1), hardware)
            rows.append(_layout_row(variant, step_time(variant, hardware)))
    return "\n".join(rows)


def _layout_row(setup: Setup, time: StepTime) -> str:
    name = f"| {setup.tensor} × {setup.data}, {setup.zero} | {setup.micro} | "
    name += f"{setup.shape.activation_checkpointing} | {estimate(setup).total / GB:.0f}"
    if not fits(setup, CARD.memory_gb):
        return f"{name}, too many | | | | | | |"
    seconds = time.seconds_by
    waiting = seconds["tensor"] + seconds["data"]
    sent = f"{time.sent_by['tensor'] / 1e9:.0f} + {time.sent_by['data'] / 1e9:.0f}"
    return (
        f"{name} | {time.seconds:.2f} | {time.seconds - waiting:.2f} | {seconds['tensor']:.2f} | "
        f"{seconds['data']:.2f} | {sent} | {time.mfu:.0%} |"
    )


def step_page(name: str) -> str:
    """Return the table of the step time of a run file's own layout."""
    setup, hardware = run_setup(name)
    time = step_time(setup, hardware)
    config = load_run_file(EXAMPLES / f"{name}.yaml")
    tokens = sum(phase.tokens or 0 for phase in config.phases)
    days = tokens / time.tokens_per_second / 86400
    rows = ["| part | seconds | |", "| --- | --- | --- |"]
    for part, seconds in time.seconds_by.items():
        rows.append(f"| {part} | {seconds:.3f} | {seconds / time.seconds:.1%} |")
    whole = f"{time.tokens_per_second:,.0f} tokens/s, MFU {time.mfu:.1%}"
    rows.append(f"| step | {time.seconds:.2f} | {whole} |")
    rows.append(
        f"\n{estimate(setup).total / GB:.0f} GB on each GPU; {tokens / 1e9:,.0f} billion tokens in "
        f"{days:.1f} days."
    )
    return "\n".join(rows)


def published_page() -> str:
    """Return the table of the estimates and the published measurements."""
    rows = [
        "| run | GPUs | seq_len | micro | again | measured, tokens/s/GPU | estimated | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    hardware = run_setup("13b-64")[1]
    for run in PUBLISHED:
        setup = Setup(run.shape, 1, run.gpus, 3, False, True, run.micro, run.accumulation)
        found = step_time(setup, hardware).tokens_per_second / run.gpus
        rows.append(
            f"| {run.source} | {run.gpus} | {run.shape.seq_len} | {run.micro} | "
            f"{run.shape.activation_checkpointing} | {run.tokens_per_second:,.0f} | {found:,.0f} | "
            f"{found / run.tokens_per_second:.2f} |"
        )
    return "\n".join(rows)


def tables() -> dict[str, str]:
    """Return all tables by the names that surround them in the page."""
    found = {"published": published_page()}
    for name in RUNS:
        found[f"{name} step"] = step_page(name)
        found[f"{name} layouts"] = layouts_page(name)
    return found


def with_tables(page: str) -> str:
    """Return the page with newly computed tables."""
    for name, table in tables().items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        assert begin in page, f"the page has no place for {name}"
        before, rest = page.split(begin)
        page = f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page to update")
    page = parser.parse_args().write
    if page is not None:
        page.write_text(with_tables(page.read_text()))
        return
    for name, table in tables().items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
