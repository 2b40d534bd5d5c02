"""`megaphase init` for published models: what it reads of them, and what it says to do first."""

import json
import shutil

import numpy as np
import pytest
from tokenizer_json_kinds import llama3
from typer.testing import CliRunner

from megaphase.checkpoint.state import NEW_TOKENS, STATE_FILE, TOKENIZER_HASH
from megaphase.cli import app
from megaphase.config.load import load_run_file
from megaphase.convert.hugging_face.config import read_config
from megaphase.convert.weight_import import foreign_state
from megaphase.corpus import CorpusWriter, DocumentBatch
from megaphase.plan.load_plan import open_run, preview_plan
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError

DOCUMENTS = {"en": 900, "hi": 150, "eu": 60}
GIVEN = ["--low", "hi,eu", "--card", "l4", "--gpus", "2", "--hours", "1"]
SPARE_ROWS = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make `hf`, a model as it is downloaded, without weights; `base`, what is known of it when it
    is converted; and corpora of its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "hf").mkdir()
    tokenizer = Tokenizer.load(llama3(folder / "hf"))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.vocab_size + SPARE_ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    _, shape = read_config(folder / "hf")
    state = foreign_state(shape, {"format": "Hugging Face"})
    (folder / "base").mkdir()
    shutil.copytree(folder / "hf", folder / "base" / "tokenizer")
    write_state(folder / "base", state | {TOKENIZER_HASH: tokenizer.fingerprint})
    for name, documents in DOCUMENTS.items():
        write_corpus(folder / name, documents, tokenizer.fingerprint, tokenizer.vocab_size)
    return folder


def write_state(folder, state):
    folder.mkdir(exist_ok=True)
    (folder / STATE_FILE).write_text(json.dumps(state))


def write_corpus(prefix, documents, fingerprint, vocab_size):
    random = np.random.default_rng(documents)
    lengths = random.integers(50, 400, documents)
    tokens = random.integers(0, 200, lengths.sum()).astype(np.uint16)
    hashes = random.integers(0, 2**64, documents, dtype=np.uint64)
    with CorpusWriter(prefix, tokenizer_hash=fingerprint, vocab_size=vocab_size, eod=0) as writer:
        writer.add_batch(DocumentBatch.of(tokens, lengths, hashes, lengths * 3))


def init(folder, checkpoint, *more):
    out = folder / "run.yaml"
    options = [part for name in DOCUMENTS for part in ("--corpus", str(folder / name))]
    options += ["--checkpoint", str(checkpoint), *GIVEN, *more]
    result = CliRunner().invoke(app, ["init", str(out), "--force", *options])
    if result.exception is not None:
        raise result.exception
    return result.stdout, load_run_file(out)


def test_a_model_as_it_is_downloaded_is_converted_first(made):
    said, config = init(made, made / "hf")
    following = said[said.index("Next:") :].split("\n")[1:]
    assert following[0].split()[:3] == ["megaphase", "convert", "from-hf"]
    assert following[2].endswith("--from hf-base")
    assert config.model.rotary_base == 500000.0
    assert config.model.vocab == Tokenizer.load(made / "hf").vocab_size + SPARE_ROWS
    assert [phase.name for phase in config.phases] == ["joint"]
    assert config.tasks_with_role("new") == ["hi", "eu"]


def test_a_converted_model_gets_the_joint_phase(made):
    said, config = init(made, made / "base")
    assert "from-hf" not in said
    assert f"--from {made / 'base'}" in said
    assert config.tokenizer in (made / "base" / "tokenizer", made / "hf")
    (joint,) = config.phases
    assert joint.optimizer_state == "reset"
    assert joint.mixture.rates["en"] == pytest.approx(0.5, abs=0.01)
    assert config.model.seq_len < 8192
    loaded, tokenizer = open_run(made / "run.yaml", ())
    last = preview_plan(loaded, tokenizer).summary()["phases"][-1]["tasks"]
    assert max(facts["epochs_so_far"] for facts in last.values()) <= 4


def test_new_rows_are_trained_first(made):
    state = json.loads((made / "base" / STATE_FILE).read_text())
    write_state(made / "extended", state | {NEW_TOKENS: [300, 320]})
    _, config = init(made, made / "extended")
    rows, joint = config.phases
    assert rows.trained == "new_embeddings"
    assert set(rows.mixture.rates) == {"hi", "eu"}
    assert joint.trained == "all"


def test_without_replay_there_is_a_warning(made):
    result = CliRunner().invoke(
        app,
        ["init", str(made / "alone.yaml"), "--corpus", str(made / "hi"), "--checkpoint",
         str(made / "base"), *GIVEN[2:], "--low", "hi"],
    )  # fmt: skip
    assert result.exit_code == 0
    assert "which it will forget" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"used": {"en": 5}}, "is the checkpoint of a run"),
        ({TOKENIZER_HASH: "other"}, "another tokenizer than the model's"),
        ({"model": {}}, "its model cannot be read"),
    ],
)
def test_what_does_not_suit(changes, problem, made):
    state = json.loads((made / "base" / STATE_FILE).read_text())
    write_state(made / "wrong", state | changes)
    with pytest.raises(InputError, match=problem):
        init(made, made / "wrong")


def test_too_few_rows_are_extended_first(made):
    state = json.loads((made / "base" / STATE_FILE).read_text())
    few = state["model"] | {"vocab": 100}
    write_state(made / "few", {**state, "model": few})
    with pytest.raises(InputError, match="convert extend-vocab"):
        init(made, made / "few")


def test_what_is_no_model(made, tmp_path):
    with pytest.raises(InputError):
        init(made, tmp_path)
    with pytest.raises(InputError, match="leave one of them out"):
        init(made, made / "base", "--model", "auto")
