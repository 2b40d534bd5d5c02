"""`megaphase convert reshape` from a user's view: its output, and rejected inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_support import RandomWeights, whole_parameters, write_random_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from run_support import make_corpora, read_rows, run_settings, timeless, write_run_file
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from warm_commands import run_well

from megaphase.checkpoint.parameters import INDEX_FILE, MOMENTS, WEIGHT
from megaphase.checkpoint.state import MANIFEST_FILE, STATE_FILE
from megaphase.cli import app
from megaphase.convert.partition import Layout, shards_of
from megaphase.model.parameters import parameter_count, parameter_layouts, parameter_specs
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError
from megaphase.utils.files import describe_file

KINDS = (WEIGHT, *MOMENTS)
SHAPE = GPTShape(vocab=50, seq_len=8, layers=2, hidden=16, heads=4, kv_heads=2, ffn=24)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Make a checkpoint of random weights and moments in two shards."""
    whole = write_random_checkpoint(tmp_path / "random", SHAPE, KINDS)
    convert("reshape", whole, "--data", 2, "--out", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def convert(*arguments: object) -> None:
    """Run `megaphase convert` in this process; its errors are raised."""
    found = CliRunner().invoke(app, ["convert", *(str(each) for each in arguments)])
    if found.exception is not None:
        raise found.exception


def rewrite(checkpoint: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a shard and its entry in the manifest."""
    save_file(tensors, checkpoint / file)
    renew_manifest(checkpoint, file)


def renew_manifest(checkpoint: Path, file: str) -> None:
    path = checkpoint / MANIFEST_FILE
    manifest = json.loads(path.read_text())
    manifest["files"][file] = describe_file(checkpoint / file)
    path.write_text(json.dumps(manifest))


def refused(checkpoint: Path, *problem: str) -> None:
    """Check that reshaping it is rejected with these words and leaves nothing behind."""
    before = sorted(checkpoint.parent.iterdir())
    with pytest.raises(InputError) as error:
        convert("reshape", checkpoint, "--portable", "--out", checkpoint.parent / "out")
    for words in problem:
        assert words in str(error.value)
    assert sorted(checkpoint.parent.iterdir()) == before


def test_portable_files_hold_whole_parameters(checkpoint: Path, tmp_path: Path) -> None:
    convert("reshape", checkpoint, "--portable", "--out", tmp_path / "portable")
    random = RandomWeights(SHAPE, KINDS)
    for name in random.layouts:
        found = load_file(tmp_path / "portable" / "parameters" / f"{name}.safetensors")
        assert found.keys() == {f"{kind}/{name}" for kind in KINDS}
        for kind in KINDS:
            assert torch.equal(found[f"{kind}/{name}"], random.whole(name, kind))


def test_weights_only_leaves_the_moments_out(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "weights"
    convert("reshape", checkpoint, "--tensor", 2, "--weights-only", "--out", out)
    assert json.loads((out / INDEX_FILE).read_text())["kinds"] == [WEIGHT]
    assert json.loads((out / STATE_FILE).read_text())["optimizer_steps"] == 0
    random = RandomWeights(SHAPE)
    for name, found in whole_parameters(out).items():
        assert torch.equal(found, random.whole(name, WEIGHT))


@settings(max_examples=60, deadline=None)
@given(
    tensor=st.sampled_from([1, 2]),
    data=st.integers(1, 9),
    zero=st.integers(0, 3),
    vocab=st.integers(1, 70),
    learned=st.booleans(),
)
def test_every_element_belongs_to_one_rank(
    tensor: int, data: int, zero: int, vocab: int, learned: bool
) -> None:
    shape = GPTShape(
        vocab=vocab, seq_len=5, layers=1, hidden=12, heads=2, kv_heads=2, ffn=10, bias=learned,
        position="learned" if learned else "rotary",
    )  # fmt: skip
    layouts = parameter_layouts(shape, tensor)
    shards = shards_of(parameter_specs(shape), Layout(tensor, data, zero))
    assert [shard.tensor_rank for shard in shards] == [*range(tensor)] * data
    for name, layout in layouts.items():
        for rank in range(tensor):
            runs = [s.pieces[name] for s in shards if s.tensor_rank == rank and name in s.pieces]
            held = [i for run in runs for i in range(run.start, run.stop)]
            cut = layout.dim is not None or rank == 0
            assert sorted(held) == list(range(layout.shard_numel(tensor) if cut else 0))


def test_a_truncated_shard_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    refused(checkpoint, f"{shard}: is truncated")


def test_an_altered_shard_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(checkpoint, f"{shard}: has been altered")


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    shard = checkpoint / "shard-00001.safetensors"
    shard.unlink()
    refused(checkpoint, f"{shard}: is missing")


def test_tensors_that_are_not_those_of_the_index_are_named(checkpoint: Path) -> None:
    file = "shard-00001.safetensors"
    tensors = load_file(checkpoint / file)
    name = "exp_avg/blocks.1.attention.out.weight"

    rewrite(checkpoint, file, {**tensors, "weight/odd": torch.zeros(3)})
    refused(checkpoint, file, "weight/odd is not in parameters.json")

    rewrite(checkpoint, file, {key: value for key, value in tensors.items() if key != name})
    refused(checkpoint, file, f"has no tensor {name}")

    rewrite(checkpoint, file, {**tensors, name: tensors[name][:-1].clone()})
    refused(checkpoint, file, f"{name} has 127 elements of torch.float32, not 128 of fp32")

    rewrite(checkpoint, file, {**tensors, name: tensors[name].half()})
    refused(checkpoint, file, f"{name} has 128 elements of torch.float16, not 128 of fp32")


def save_index(checkpoint: Path, index: dict) -> None:
    """Write the index as if the checkpoint had been saved with it."""
    (checkpoint / INDEX_FILE).write_text(json.dumps(index))
    renew_manifest(checkpoint, INDEX_FILE)


def test_elements_in_two_shards_or_none_are_named(checkpoint: Path) -> None:
    name, file = "blocks.1.attention.out.weight", "shard-00001.safetensors"
    index = json.loads((checkpoint / INDEX_FILE).read_text())
    pieces = index["shards"][file]["pieces"]
    assert pieces[name] == [128, 256]

    pieces[name] = [127, 255]
    save_index(checkpoint, index)
    refused(checkpoint, file, f"elements of {name} from 127 on are also in another shard")

    pieces[name] = [129, 257]
    save_index(checkpoint, index)
    refused(checkpoint, f"element 128 of {name}, tensor-parallel rank 0, is in none of its shards")


def test_another_model_than_the_state_says_is_refused(checkpoint: Path) -> None:
    path = checkpoint / STATE_FILE
    state = json.loads(path.read_text())
    state["model"]["layers"] = 3
    path.write_text(json.dumps(state))
    refused(checkpoint, "has no parameter blocks.2.attention_norm.weight")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--portable: is not given, nor a layout; give --tensor and --data, or --portable"),
        (["--portable", "--data", 2], "--portable: excludes --tensor, --data and --zero"),
        (["--tensor", 3], "--tensor 3: does not divide the model's heads, 4"),
        (["--tensor", 4], "--tensor 4: does not divide the model's kv_heads, 2"),
    ],
)
def test_wrong_options_are_named(options: list[object], problem: str, checkpoint: Path) -> None:
    with pytest.raises(InputError) as error:
        convert("reshape", checkpoint, *options, "--out", checkpoint.parent / "out")
    assert str(error.value).startswith(problem)
    assert not (checkpoint.parent / "out").exists()


def test_what_is_there_is_not_replaced(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="exists already; choose another --out"):
        convert("reshape", checkpoint, "--portable", "--out", checkpoint)


# In a process of its own; without the memory that it needs to be there at all.
MEASURE = """
import sys
from megaphase.cli import app
from megaphase.convert import reshape

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
app(["convert", *sys.argv[1:]], standalone_mode=False)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_is_bounded_by_the_largest_parameter(tmp_path: Path) -> None:
    shape = GPTShape(vocab=20_000, seq_len=8, layers=12, hidden=768, heads=4, kv_heads=4, ffn=3072)
    largest, constant = 4 * shape.vocab * shape.hidden, 48 << 20
    write_random_checkpoint(tmp_path / "random", shape)
    options = ["--tensor", "2", "--data", "2", "--out", tmp_path / "out"]
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, "reshape", tmp_path / "random", *options],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    used = int(found.stdout.split()[-1])
    assert used < 2 * largest + constant < 4 * parameter_count(shape) / 2


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.mark.distributed
def test_a_branch_from_a_reshaped_checkpoint_is_the_same_run(corpora: Path, tmp_path: Path) -> None:
    settings = run_settings(corpora)
    first, second = settings["phases"]
    base = write_run_file(tmp_path / "base", {**settings, "phases": [first]})
    branch = write_run_file(tmp_path / "branch", {**settings, "phases": [second]})
    other = write_run_file(tmp_path / "other", {**settings, "phases": [second]})
    run_well("train", base)
    name = f"{tmp_path / 'base' / 'run'}@{first['name']}"
    run_well("convert", "reshape", name, "--tensor", 2, "--data", 3, "--out", tmp_path / "shards")
    run_well("train", branch, "--from", name)
    run_well("train", other, "--from", tmp_path / "shards")
    rows = [
        [row for row in timeless(read_rows(path.parent / "run")) if row.get("event") != "branch"]
        for path in (branch, other)
    ]
    assert rows[0] == rows[1]
