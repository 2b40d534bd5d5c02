"""Means of the weights of checkpoints of any layouts, compared with plain torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convert_support import RandomWeights, whole_parameters, write_random_checkpoint
from data_support import make_tokenizer
from rich.console import Console
from rounding import FP32
from typer.testing import CliRunner

from megaphase.checkpoint.parameters import StoredParameters
from megaphase.convert.average import average
from megaphase.convert.checkpoint_writer import Form, form_for, portable_form, write_checkpoint
from megaphase.convert.commands import convert_app
from megaphase.convert.inspect import Contents
from megaphase.convert.inspect_table import inspection_table
from megaphase.convert.partition import Layout
from megaphase.convert.source import open_source
from megaphase.convert.source_tokenizer import load_tokenizer
from megaphase.convert.weight_import import foreign_state
from megaphase.model.parameters import parameter_count
from megaphase.model.shape import GPTShape
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

SHAPE = GPTShape(vocab=99, seq_len=16, layers=2, hidden=32, heads=4, kv_heads=2, ffn=48)
FORMS = [
    form_for(SHAPE, Layout(1, 1, 0)),
    form_for(SHAPE, Layout(2, 2, 3)),
    form_for(SHAPE, Layout(2, 1, 1)),
    portable_form(SHAPE),
]
KINDS = ("weight", "exp_avg", "exp_avg_sq", "average")


class Other(RandomWeights):
    """Other random values than those of another number; one parameter is the same in all."""

    def __init__(self, number: int, shape: GPTShape = SHAPE) -> None:
        super().__init__(shape, KINDS)
        self._number = number

    def whole(self, name: str, kind: str) -> torch.Tensor:
        found = super().whole(name, kind)
        if name == "norm.weight":
            return found
        return found.roll(self._number, 0) * (1 + 0.1 * self._number)


def write(folder: Path, number: int, form: Form, shape: GPTShape = SHAPE, **state: object) -> str:
    folder.mkdir(parents=True)
    facts = foreign_state(shape, {}) | {"step": 100 + number, "optimizer_steps": 5} | state
    facts["average"] = {"kind": "uniform", "taken": 3}
    write_checkpoint(folder, Other(number, shape), KINDS, form, facts, workers=1)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return [write(folder / str(i), i, form) for i, form in enumerate(FORMS)]


@pytest.mark.parametrize("shares", [None, [0.5, 1.0, 2.0, 4.0]])
@pytest.mark.parametrize("kind", ["weight", "average"])
def test_the_mean_is_that_of_plain_torch_over_any_layouts(
    checkpoints: list[str], shares: list[float] | None, kind: str, tmp_path: Path
) -> None:
    out = tmp_path / "mean"
    newest = average(checkpoints, shares, out, of_averages=kind == "average", workers=3)
    assert newest.state["step"] == 103
    stored = open_source(str(out))
    assert stored.weights.kinds == ("weight",)
    assert (stored.state["step"], stored.state["optimizer_steps"]) == (103, 0)
    assert "average" not in stored.state
    total = sum(shares or [1.0] * 4)
    assert [each["share"] for each in stored.state["averaged"]] == [
        share / total for share in shares or [1.0] * 4
    ]
    found = whole_parameters(out)
    sources = [whole_parameters(Path(each), kind) for each in checkpoints]
    for name, mean in found.items():
        wanted = sum(
            share / total * source[name].double()
            for share, source in zip(shares or [1.0] * 4, sources, strict=True)
        )
        scale = max(float(source[name].abs().max()) for source in sources)
        torch.testing.assert_close(mean.double(), wanted, rtol=0, atol=FP32 * scale)
    assert torch.equal(found["norm.weight"], sources[0]["norm.weight"])  # equal in all of them


def test_the_result_is_a_checkpoint_for_the_other_commands(
    checkpoints: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "mean"
    runner = CliRunner()
    arguments = ["average", *checkpoints[:2], "--weights", "1,3", "--out", str(out)]
    result = runner.invoke(convert_app, arguments)
    assert result.exit_code == 0, result.output
    assert f"Checkpoint: {out}" in result.output
    assert f"history are those of {checkpoints[1]}" in result.output
    result = runner.invoke(convert_app, ["inspect", str(out), "--json"])
    assert [each["share"] for each in json.loads(result.output)["average of"]] == [0.25, 0.75]
    reshaped = ["reshape", str(out), "--tensor", "2", "--data", "2", "--out", str(tmp_path / "r")]
    assert runner.invoke(convert_app, reshaped).exit_code == 0
    for name, tensor in whole_parameters(tmp_path / "r").items():
        assert torch.equal(tensor, StoredParameters(out).whole(name, "weight"))
    exported = ["to-hf", str(out), "--no-tokenizer", "--out", str(tmp_path / "hf")]
    assert runner.invoke(convert_app, exported).exit_code == 0


def test_other_models_tokenizers_and_options_are_refused(
    checkpoints: list[str], tmp_path: Path
) -> None:
    first = checkpoints[0]
    other = {
        "layers": replace(SHAPE, layers=1),
        "vocab": replace(SHAPE, vocab=98),
        "rotary_base": replace(SHAPE, rotary_base=5e5),
    }
    made = {
        key: write(tmp_path / key, 1, portable_form(shape), shape) for key, shape in other.items()
    }
    words = [
        write(tmp_path / name, 1, portable_form(SHAPE), tokenizer_hash=name) for name in ("a", "b")
    ]
    longer = replace(SHAPE, seq_len=32)
    long = write(tmp_path / "long", 1, portable_form(longer), longer)
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints[3], damaged)
    with open(damaged / "parameters" / "norm.weight.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    refused = [
        ([first], None, "is a single checkpoint"),
        ([first, made["layers"]], None, "model.layers is 1, but .* has 2"),
        ([first, made["vocab"]], None, "vocabulary is 98, but .* has 99"),
        ([first, made["rotary_base"]], None, "model.rotary_base is 500000.0"),
        (words, None, "another tokenizer than"),
        ([first, checkpoints[1], first], None, "there twice"),
        ([first, checkpoints[1]], [1.0], "has 1 numbers for 2 checkpoints"),
        ([first, checkpoints[1]], [1.0, 0.0], "0 is not from 1e-06"),
        ([first, str(damaged)], None, "norm.weight.safetensors"),
    ]
    out = tmp_path / "out"
    for texts, shares, said in refused:
        with pytest.raises(InputError, match=said):
            average(texts, shares, out, workers=1)
        assert not out.exists()
    average([first, words[0], long], None, out, workers=1)  # what is not known does not differ


# In a process of its own; without the memory that it needs to be there at all.
MEASURE = """
import sys
from megaphase.cli import app
from megaphase.convert import average

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
app(["convert", "average", *sys.argv[1:]], standalone_mode=False)
print(peak() - before)
"""


def test_memory_is_bounded_by_the_largest_parameter(tmp_path: Path) -> None:
    shape = GPTShape(vocab=20_000, seq_len=8, layers=2, hidden=768, heads=4, kv_heads=4, ffn=3072)
    largest, constant = 4 * shape.vocab * shape.hidden, 48 << 20
    first = write_random_checkpoint(tmp_path / "0", shape)
    texts = [first]
    for number in (1, 2, 3):
        texts.append(tmp_path / str(number))
        shutil.copytree(first, texts[-1], copy_function=os.link)
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *texts, "--out", tmp_path / "out"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    used = int(found.stdout.split()[-1])
    assert used < 3 * largest + constant < len(texts) * 4 * parameter_count(shape) / 2


def test_the_tokenizer_of_all_sources_is_copied(tmp_path: Path) -> None:
    tokenizers = [Tokenizer.load(make_tokenizer(tmp_path / str(i), seed=i)) for i in (3, 4)]
    one, other = (each.fingerprint for each in tokenizers)
    assert one != other
    shape = replace(SHAPE, vocab=tokenizers[0].vocab_size)

    def source(name: str, tokenizer: Tokenizer | None, made_with: str | None) -> str:
        state = {} if made_with is None else {"tokenizer_hash": made_with}
        folder = write(tmp_path / name, 1, portable_form(shape), shape, **state)
        if tokenizer is not None:
            shutil.copytree(tokenizer.path, Path(folder) / "tokenizer")
        return folder

    def mean(out: str, *sources: str) -> str:
        arguments = ["average", *sources, "--out", str(tmp_path / out)]
        result = CliRunner().invoke(convert_app, arguments)
        assert result.exit_code == 0, result.output
        return result.output

    with_files = [source(name, tokenizers[0], one) for name in ("a", "b")]
    recorded, unknown = source("c", None, one), source("d", None, None)
    not_recorded = source("e", tokenizers[1], None)
    for out, sources in (("all", with_files), ("recorded", [with_files[0], recorded])):
        assert "without a tokenizer" not in mean(out, *sources)
        assert load_tokenizer(open_source(str(tmp_path / out)), None).fingerprint == one
    for out, sources in (
        ("unknown", [with_files[0], unknown]),
        ("other", [with_files[0], not_recorded]),
        ("none", [unknown, recorded]),
    ):
        assert "without a tokenizer" in mean(out, *sources)
        assert not (tmp_path / out / "tokenizer").exists()


def test_inspect_names_one_source_a_line(checkpoints: list[str], tmp_path: Path) -> None:
    average(checkpoints[:2], None, tmp_path / "mean", workers=1)
    state = open_source(str(tmp_path / "mean")).state
    contents = Contents("megaphase", {"average of": state["averaged"]}, {}, 1, None)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspection_table(contents))
    first, second = [line for line in capture.get().splitlines() if "checkpoint " in line]
    words = ["average", "of", *f"checkpoint {checkpoints[0]}, step 100, share 0.5".split()]
    assert first.split() == words
    assert second.split() == f"checkpoint {checkpoints[1]}, step 101, share 0.5".split()


def test_a_tokenizer_that_is_a_file_is_copied(tmp_path: Path) -> None:
    """Where the folder has the same tokens as the file alone; otherwise it is said."""
    made = make_tokenizer(tmp_path / "tok")
    bare = tmp_path / "bare.model"
    shutil.copyfile(made / "tokenizer.model", bare)
    tokenizer = Tokenizer.load(bare)
    shape = replace(SHAPE, vocab=tokenizer.vocab_size)
    for number in (1, 2):
        state = {"tokenizer_hash": tokenizer.fingerprint}
        write(
            tmp_path / "run" / "checkpoints" / f"step-0000000{number}", number,
            portable_form(shape), shape, **state,
        )  # fmt: skip
    (tmp_path / "run" / "run.json").write_text(json.dumps({"tokenizer": str(bare)}))
    sources = [f"{tmp_path / 'run'}@step-0000000{number}" for number in (1, 2)]
    result = CliRunner().invoke(convert_app, ["average", *sources, "--out", str(tmp_path / "mean")])
    assert result.exit_code == 0, result.output
    assert "without a tokenizer" not in result.output
    found = load_tokenizer(open_source(str(tmp_path / "mean")), None)
    assert found.fingerprint == tokenizer.fingerprint
