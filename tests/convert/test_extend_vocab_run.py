"""New languages for a trained model, with the commands that a user types.

A run is trained, its tokenizer and its vocabulary are extended, the rows of the new tokens are
trained alone and then everything, and the result is exported to transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_support import whole_parameters
from hf_support import megaphase_logits, transformers_logits
from rounding import FP32, deviation
from run_support import read_rows, run_settings, timeless, write_run_file
from warm_commands import run, run_killed, run_well

from megaphase.checkpoint.state import STATE_FILE
from megaphase.data_tools.synthetic.languages import write_languages
from megaphase.data_tools.tokenization.tokenize import tokenize
from megaphase.data_tools.tokenizers.extend import extend_tokenizer
from megaphase.data_tools.tokenizers.train import train_tokenizer
from megaphase.tokenizer import Tokenizer, pieces_replaced

TEXT_BYTES = {"alda": 60_000, "boreth": 40_000, "cimri": 12_000}
OLD, NEW = ("alda", "boreth"), "cimri"
SEQ_LEN = 32
ADDED = 40
PRETRAIN_STEPS, ROW_STEPS, JOINT_STEPS = 6, 4, 4
VOCAB_MATRICES = ("embedding.weight", "head.weight")


@dataclass(frozen=True)
class Extension:
    """A trained run, its extended tokenizer, and the run file of the joint phase."""

    library: str
    folder: Path
    texts: dict[str, Path]
    printed: str

    @property
    def base(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "tok")

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder / "new")

    @property
    def source(self) -> str:
        return f"{self.folder / 'base' / 'run'}@pretrain"

    @property
    def extended(self) -> Path:
        return self.folder / "extended"

    def phases(self) -> list[dict[str, Any]]:
        rate = {"schedule": "constant", "peak": 1e-2, "warmup_steps": 0}
        mixture = {"rates": {"alda": 0.3, "boreth": 0.2, "cimri": 0.5}}
        phase = {"mixture": mixture, "learning_rate": rate, "optimizer_state": "reset"}
        return [
            phase | {"name": "rows", "steps": ROW_STEPS, "trained": "new_embeddings"},
            phase | {"name": "joint", "steps": JOINT_STEPS},
        ]

    def run_file(self, name: str, **changes: Any) -> Path:
        settings = run_settings(self.folder, **changes)
        settings["tokenizer"] = str(self.extended / "tokenizer")
        settings["tasks"] = {n: {"corpus": str(self.folder / "data" / n)} for n in TEXT_BYTES}
        return write_run_file(self.folder / name, settings | {"phases": self.phases()} | changes)


# A byte-level BPE is also in the test of examples/add-languages.
@pytest.fixture(
    scope="module",
    params=["sentencepiece", pytest.param("tokenizers", marks=pytest.mark.slow)],
)
def extension(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Extension:
    folder, library = tmp_path_factory.mktemp("extension"), request.param
    texts = write_languages(folder / "text", seed=5, languages=TEXT_BYTES)
    train_tokenizer(
        {name: [texts[name]] for name in OLD}, folder / "tok", vocab_size=400, library=library
    )
    for name in OLD:
        tokenize([texts[name]], folder / "tok", folder / "base" / name, workers=1)
    settings = run_settings(folder)
    settings["tasks"] = {name: {"corpus": str(folder / "base" / name)} for name in OLD}
    settings["tokenizer"] = str(folder / "tok")
    settings["phases"] = settings["phases"][:1]
    settings["phases"][0]["steps"] = PRETRAIN_STEPS
    run_well("train", write_run_file(folder / "base", settings))
    run_well(
        "tokenizer", "extend", folder / "tok", "--input", f"{NEW}={texts[NEW]}", "--add", ADDED,
        "--out", folder / "new",
    )  # fmt: skip
    found = Extension(library, folder, texts, "")
    printed = run_well(
        "convert", "extend-vocab", found.source, "--tokenizer", folder / "new", "--out",
        found.extended, "--check", f"alda={texts['alda']}", "--check",
        f"boreth={folder / 'base' / 'boreth'}",
    )  # fmt: skip
    for name, text in texts.items():
        tokenize([text], folder / "new", folder / "data" / name, workers=1)
    return Extension(library, folder, texts, printed)


@pytest.fixture(scope="module")
def trained(extension: Extension) -> Path:
    """Return the run directory after both phases, the first of which was killed once."""
    run_file = extension.run_file("joint")
    run_killed(run_file, "--from", extension.extended, before_step=3)
    run_well("train", run_file)
    return run_file.parent / "run"


def test_the_rows_are_those_of_the_replaced_tokens(extension: Extension) -> None:
    base, new = extension.base, extension.tokenizer
    replaced = pieces_replaced(new, base)
    assert len(replaced) == ADDED
    before = whole_parameters(
        extension.folder / "base/run/checkpoints" / f"step-{PRETRAIN_STEPS:08d}"
    )
    after = whole_parameters(extension.extended)
    assert before.keys() == after.keys()
    for name, old in before.items():
        if name not in VOCAB_MATRICES:
            assert torch.equal(after[name], old)
            continue
        assert after[name].shape == (new.vocab_size, 32)
        assert torch.equal(after[name][: base.vocab_size], old)
        for token, ids in enumerate(replaced, base.vocab_size):
            # By hand, so that the order of the sum is that of the ids.
            expected = sum(old[i].double() for i in ids) / len(ids)
            assert torch.equal(after[name][token], expected.float())


def test_losses_before_and_after_are_printed(extension: Extension) -> None:
    lines = [line.split("│") for line in extension.printed.splitlines() if "│" in line]
    rows = {cells[1].strip(): [float(c.replace(",", "")) for c in cells[2:-1]] for cells in lines}
    assert rows.keys() == {"alda", "boreth"}
    for before, after, with_new, tokens, new_tokens in rows.values():
        assert after == pytest.approx(before, rel=0.1)
        assert after > before  # a token has more competitors
        assert with_new == pytest.approx(before, rel=0.1)
        assert 0 < new_tokens <= tokens
    assert "The tokens are those of the text" in " ".join(extension.printed.split())
    new = extension.tokenizer.vocab_size - extension.base.vocab_size
    assert f"{new:,} new tokens" in extension.printed
    assert (extension.extended / "model.yaml").read_text() in extension.printed


def test_the_first_phase_changes_the_new_rows_alone(
    extension: Extension, trained: Path, tmp_path: Path
) -> None:
    first, stop = extension.base.vocab_size, extension.tokenizer.vocab_size
    before = whole_parameters(extension.extended)
    rows = whole_parameters(trained / "checkpoints" / f"step-{ROW_STEPS:08d}")
    joint = whole_parameters(trained / "checkpoints" / f"step-{ROW_STEPS + JOINT_STEPS:08d}")
    for name, old in before.items():
        if name in VOCAB_MATRICES:
            assert torch.equal(rows[name][:first], old[:first])
            assert not torch.equal(rows[name][first:stop], old[first:stop])
        else:
            assert torch.equal(rows[name], old)
        assert not torch.equal(joint[name], old)
    events = [row for row in read_rows(trained) if row.get("event") == "phase_start"]
    assert [event.get("trained_tokens") for event in events] == [[first, stop], None]
    run_well("report", trained, "--out", tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert f"rows trains only the rows of tokens {first:,} to {stop - 1:,}" in page
    shown = " ".join(run_well("plan", trained.parent / "run.yaml").split())
    assert "rows trains the rows of new tokens alone; memory and time" in shown


def test_a_killed_phase_goes_on_exactly(extension: Extension, trained: Path) -> None:
    other = extension.run_file("never-killed")
    run_well("train", other, "--from", extension.extended)
    rows = [timeless(read_rows(path)) for path in (trained, other.parent / "run")]
    assert rows[0] == rows[1]


def test_the_export_gives_the_same_logits_and_ids(
    extension: Extension, trained: Path, tmp_path: Path
) -> None:
    import transformers

    run_well("convert", "to-hf", f"{trained}@joint", "--out", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == extension.tokenizer.vocab_size
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    new, seen = extension.tokenizer, set()
    for path in extension.texts.values():
        for line in path.read_text().splitlines()[:20]:
            text = json.loads(line)["text"]
            ids = tokenizer(text)["input_ids"]
            assert ids == new.encode(text)
            seen |= set(ids)
    assert seen & set(range(extension.base.vocab_size, new.vocab_size))
    tokens = torch.arange(new.vocab_size - 2 * SEQ_LEN, new.vocab_size).view(2, SEQ_LEN)
    checkpoint = trained / "checkpoints" / f"step-{ROW_STEPS + JOINT_STEPS:08d}"
    found = transformers_logits(tmp_path / "hf", tokens)
    assert deviation(found, megaphase_logits(checkpoint, tokens)) < FP32
    run_well("convert", "to-hf", extension.extended, "--out", tmp_path / "untrained")
    found = transformers_logits(tmp_path / "untrained", tokens)
    assert deviation(found, megaphase_logits(extension.extended, tokens)) < FP32


def test_a_later_run_knows_which_tokens_are_new(
    extension: Extension, trained: Path, tmp_path: Path
) -> None:
    checkpoint = trained / "checkpoints" / f"step-{ROW_STEPS:08d}"
    first, stop = extension.base.vocab_size, extension.tokenizer.vocab_size
    assert json.loads((checkpoint / STATE_FILE).read_text())["new_tokens"] == [first, stop]
    phase = extension.phases()[0] | {"name": "again", "steps": 1}
    run_file = extension.run_file("again", phases=[phase])
    run_well("train", run_file, "--from", f"{trained}@rows")
    events = [row for row in read_rows(run_file.parent / "run") if row.get("event")]
    assert [first, stop] in [event.get("trained_tokens") for event in events]


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def test_another_tokenizer_is_refused(extension: Extension, tmp_path: Path) -> None:
    if extension.library != "sentencepiece":
        pytest.skip("the same for both libraries")
    out = ("--out", tmp_path / "out")
    texts = {name: [extension.texts[name]] for name in OLD}
    train_tokenizer(texts, tmp_path / "tok", vocab_size=380)
    extend_tokenizer(tmp_path / "tok", {NEW: [extension.texts[NEW]]}, tmp_path / "new", add=ADDED)
    told = refused("convert", "extend-vocab", extension.source, "--tokenizer", tmp_path / "new",
                   *out)  # fmt: skip
    assert str(tmp_path / "new") in told
    assert str(extension.folder / "tok") in told
    told = refused("convert", "extend-vocab", extension.source, "--tokenizer", tmp_path / "new",
                   "--base-tokenizer", tmp_path / "tok", *out)  # fmt: skip
    assert str(tmp_path / "tok") in told
    assert extension.base.fingerprint in told
    assert "give --base-tokenizer" not in told
    told = refused("convert", "extend-vocab", extension.source, "--tokenizer",
                   extension.folder / "tok", *out)  # fmt: skip
    assert "does not extend another tokenizer" in told
    told = refused("convert", "extend-vocab", extension.source, "--tokenizer",
                   extension.folder / "new", "--check", f"cimri={extension.folder / 'data/cimri'}",
                   *out)  # fmt: skip
    assert "was tokenized with another tokenizer" in told
    assert not (tmp_path / "out").exists()


def test_the_base_of_a_reshaped_checkpoint_is_given(extension: Extension, tmp_path: Path) -> None:
    shards, out = tmp_path / "shards", tmp_path / "out"
    run_well("convert", "reshape", extension.source, "--tensor", 2, "--data", 2, "--out", shards)
    arguments = ["convert", "extend-vocab", shards, "--tokenizer", extension.folder / "new"]
    told = refused(*arguments, "--out", out)
    assert "its tokenizer is not known; give --base-tokenizer" in told
    run_well(*arguments, "--base-tokenizer", extension.folder / "tok", "--out", out)
    expected = whole_parameters(extension.extended)
    for name, found in whole_parameters(out).items():
        assert torch.equal(found, expected[name]), name


def test_new_tokens_must_be_known(extension: Extension, tmp_path: Path) -> None:
    if extension.library != "sentencepiece":
        pytest.skip("the same for both libraries")
    rows = extension.phases()[0]
    run_file = extension.run_file("unknown", phases=[rows])
    told = refused("train", run_file)
    assert "phases[0].trained: is new_embeddings, but the run starts from no checkpoint" in told
    run_file = extension.run_file("beyond", phases=[rows | {"first_new_token": 10_000}])
    for command in ("plan", "train"):
        told = refused(command, run_file)
        assert "phases[0].first_new_token: is 10,000, but the tokenizer has" in told
    run_file = extension.run_file("given", phases=[rows | {"first_new_token": 100, "steps": 1}])
    run_well("train", run_file)
    events = [row for row in read_rows(run_file.parent / "run") if row.get("event")]
    stop = extension.tokenizer.vocab_size
    assert [100, stop] in [event.get("trained_tokens") for event in events]


def test_frozen_phases_need_a_reset(extension: Extension) -> None:
    if extension.library != "sentencepiece":
        pytest.skip("the same for both libraries")
    rows, joint = extension.phases()
    run_file = extension.run_file("keeps", phases=[rows, joint | {"optimizer_state": "keep"}])
    assert "phases[1].optimizer_state: is keep, but rows has" in refused("train", run_file)
    run_file = extension.run_file("kept", phases=[rows | {"optimizer_state": "keep"}])
    assert "trained: new_embeddings needs optimizer_state: reset" in refused("train", run_file)
    run_file = extension.run_file("all", phases=[joint | {"first_new_token": 3}])
    assert "first_new_token is only for" in refused("train", run_file)
