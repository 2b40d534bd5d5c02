"""Every family of Hugging Face models, both ways: logits, training and weights are the same.

A random model of transformers is imported; its logits, and the losses of ten steps in which both
are trained, agree; it is exported again, and transformers computes the first model's logits.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from convert_support import whole_parameters
from distributed import once, run_ranks
from engine_support import CLIP, build_engine, global_batch, load_fp32_weights, run_config, share
from hf_families import FAMILY_CONFIGS, SEQ_LEN, VOCAB
from hf_support import (
    export,
    loaded_model,
    make_transformers_model,
    megaphase_logits,
    random_tokens,
    take,
    transformers_logits,
)
from rounding import FP32, deviation
from safetensors.torch import load_file
from torch import Tensor

from megaphase.convert.hugging_face.config import read_config
from megaphase.convert.source import open_source
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid, start_process_grid
from megaphase.distributed.sharding import layout_of
from megaphase.model.gpt import GPT
from megaphase.model.kv_cache import KVCache

STEPS = 10
LEARNING_RATE = 3e-3
TOKENS = random_tokens(VOCAB, seq=SEQ_LEN)
RECOMPUTATION = ("none", "selective", "full")


@once
def imported() -> Path:
    """Return a folder with every family's model of transformers, and the same imported."""
    folder = Path(tempfile.mkdtemp(prefix="families-"))
    for name, config in FAMILY_CONFIGS.items():
        make_transformers_model(config()).save_pretrained(folder / name / "theirs")
        take(folder / name / "theirs", folder / name / "ours")
    return folder


def shards_of(model: GPT, weights: dict[str, Tensor], grid: ProcessGrid) -> dict[str, Tensor]:
    """Return this rank's shards of whole parameters."""
    return {
        name: layout_of(parameter).shard(weights[name], grid.tensor_rank, grid.tensor_size)
        for name, parameter in model.named_parameters()
    }


def in_four_ranks(folder: str) -> dict[tuple[str, Any], Any]:
    """Return this rank's logits of every family at tensor 2 and, where its heads allow that, 4; and
    the losses of its training at tensor 2 × data 2, ZeRO-3, every second time with sequence
    parallelism."""
    found: dict[tuple[str, Any], Any] = {}
    with process_group():
        grids = {tensor: start_process_grid(tensor) for tensor in (4, 2)}
        for number, name in enumerate(FAMILY_CONFIGS):
            ours = Path(folder) / name / "ours"
            shape, weights = open_source(str(ours)).shape, whole_parameters(ours)
            shards: dict[str, Tensor] = {}
            for tensor, grid in grids.items():
                if shape.kv_heads % tensor:
                    continue
                model = GPT(shape, Initializer(1, torch.float32), grid)
                shards = shards_of(model, weights, grid)
                model.load_state_dict(shards, strict=False)  # a tied head is no parameter
                with torch.no_grad():
                    found[name, tensor] = model(TOKENS)
            section = yaml.safe_load((ours / "model.yaml").read_text())["model"]
            settings = section | {"activation_checkpointing": RECOMPUTATION[number % 3]}
            config = run_config(model=settings, tensor=2, zero=3, sequence=number % 2 == 1)
            engine = build_engine(config, VOCAB)
            load_fp32_weights(engine, shards)
            losses = []
            for step in range(STEPS):
                batch = share(global_batch(step, vocab=VOCAB), engine.grid)
                losses.append(engine.train_step(batch, LEARNING_RATE).losses.mean)
            found[name, "losses"] = losses
    return found


@once
def on_four_ranks() -> list[dict[tuple[str, Any], Any]]:
    return run_ranks(in_four_ranks, 4, str(imported()))


def plain_losses(theirs: Path) -> list[float]:
    """The losses of the same steps by plain torch on the model of transformers."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32)
    matrices = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    losses = []
    for step in range(STEPS):
        batch = global_batch(step, vocab=VOCAB)
        logits = model(batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_logits(name: str) -> None:
    expected = transformers_logits(imported() / name / "theirs", TOKENS)
    found = megaphase_logits(imported() / name / "ours", TOKENS)
    assert deviation(found, expected) < FP32


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_logits_of_cached_tokens(name: str) -> None:
    """Rows of different lengths: 20 tokens at once, then one after the other."""
    expected = transformers_logits(imported() / name / "theirs", TOKENS)
    model = loaded_model(imported() / name / "ours")
    padding, prompt = torch.tensor([0, 3, 7]), 20
    cache = KVCache(model.shape, padding, rows=3, slots=SEQ_LEN, dtype=torch.float32)
    rows = [torch.cat([TOKENS[i, :n], TOKENS[i, : SEQ_LEN - n]]) for i, n in enumerate(padding)]
    fed = torch.stack(rows)
    with torch.no_grad():
        found = {prompt: model(fed[:, :prompt], cache=cache)}
        for slot in range(prompt, SEQ_LEN):
            found[slot + 1] = model(fed[:, slot : slot + 1], cache=cache)
    for filled, logits in found.items():
        last = torch.stack([expected[i, filled - n - 1] for i, n in enumerate(padding)])
        assert deviation(logits, last) < FP32, filled


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_weights_and_logits_of_the_export(name: str, tmp_path: Path) -> None:
    theirs = imported() / name / "theirs"
    again = export(imported() / name / "ours", tmp_path / "again", None, no_tokenizer=True)
    before, after = (load_file(each / "model.safetensors") for each in (theirs, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    assert torch.equal(transformers_logits(again, TOKENS), transformers_logits(theirs, TOKENS))


def test_layers_with_windows_are_those_of_transformers_without_layer_types(tmp_path: Path) -> None:
    """Files of earlier versions of transformers have other keys, from which they follow."""
    found = 0
    for name in FAMILY_CONFIGS:
        config = json.loads((imported() / name / "theirs" / "config.json").read_text())
        if "layer_types" not in config:
            continue
        _, shape = read_config(imported() / name / "theirs")
        del config["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert read_config(tmp_path) == (read_config(imported() / name / "theirs")[0], shape)
        found += shape.sliding_window is not None
    assert found >= 2


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_logits_of_tensor_parallel_ranks(name: str) -> None:
    expected = transformers_logits(imported() / name / "theirs", TOKENS)
    for tensor in (2, 4):
        if (name, tensor) in on_four_ranks()[0]:
            parts = [rank[name, tensor] for rank in on_four_ranks()[:tensor]]
            assert deviation(torch.cat(parts, -1)[..., :VOCAB], expected) < FP32, tensor


@pytest.mark.distributed
@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_training_is_that_of_plain_torch(name: str) -> None:
    losses = on_four_ranks()[0][name, "losses"]
    assert losses == pytest.approx(plain_losses(imported() / name / "theirs"), rel=FP32)
