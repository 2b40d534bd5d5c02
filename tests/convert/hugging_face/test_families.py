"""Every family of Hugging Face models, both ways: logits, training and weights are the same.

A random model of transformers is imported; its logits of random tokens and of text in five scripts,
and the losses of ten steps in which both are trained, agree; it is exported again, and transformers
computes the first model's logits.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from convert_support import whole_parameters
from distributed import once, run_ranks
from engine_support import CLIP, build_engine, global_batch, load_fp32_weights, run_config, share
from five_scripts import text_tokens
from hf_families import FAMILY_CONFIGS, SEQ_LEN, SIZES, SLOW, VOCAB
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
from megaphase.convert.hugging_face.families import family_for
from megaphase.convert.source import open_source
from megaphase.distributed.all_ranks import process_group
from megaphase.distributed.initialization import Initializer
from megaphase.distributed.process_grid import ProcessGrid, start_process_grid
from megaphase.distributed.sharding import layout_of
from megaphase.model.config import RotaryConfig, RotaryScalingConfig
from megaphase.model.gpt import GPT
from megaphase.model.kv_cache import KVCache
from megaphase.model.shape import GPTShape
from megaphase.utils.errors import InputError

STEPS = 10
LEARNING_RATE = 3e-3
TOKENS = torch.cat([random_tokens(VOCAB, seq=SEQ_LEN), text_tokens(VOCAB, SEQ_LEN)])
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


def in_four_ranks(folder: str, names: list[str]) -> dict[tuple[str, Any], Any]:
    """Return this rank's logits of families at tensor 2 and, where its heads allow that, 4; and the
    losses of their training at tensor 2 × data 2, ZeRO-3, every second time with sequence
    parallelism."""
    found: dict[tuple[str, Any], Any] = {}
    with process_group():
        grids = {tensor: start_process_grid(tensor) for tensor in (4, 2)}
        for number, name in enumerate(names):
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
def on_four_ranks(slow: bool) -> list[dict[tuple[str, Any], Any]]:
    names = [name for name in FAMILY_CONFIGS if (name in SLOW) == slow]
    return run_ranks(in_four_ranks, 4, str(imported()), names)


IN_FOUR_RANKS = [
    pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FAMILY_CONFIGS
]


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


Record = Callable[[str, object], None]  # pytest's, of what benchmarks/families.py prints


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_logits(name: str, record_property: Record) -> None:
    expected = transformers_logits(imported() / name / "theirs", TOKENS)
    found = megaphase_logits(imported() / name / "ours", TOKENS)
    record_property("tensor 1", deviation(found, expected))
    assert deviation(found, expected) < FP32


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_logits_of_cached_tokens(name: str, record_property: Record) -> None:
    """Three rows of different lengths: 20 tokens at once, then one after the other."""
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
    deviations = {}
    for filled, logits in found.items():
        last = torch.stack([expected[i, filled - n - 1] for i, n in enumerate(padding)])
        deviations[filled] = deviation(logits, last)
    record_property("generation", max(deviations.values()))
    assert max(deviations.values()) < FP32, deviations


@pytest.mark.parametrize("name", FAMILY_CONFIGS)
def test_weights_and_logits_of_the_export(
    name: str, tmp_path: Path, record_property: Record
) -> None:
    theirs = imported() / name / "theirs"
    again = export(imported() / name / "ours", tmp_path / "again", None, no_tokenizer=True)
    before, after = (load_file(each / "model.safetensors") for each in (theirs, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    assert torch.equal(transformers_logits(again, TOKENS), transformers_logits(theirs, TOKENS))
    record_property("export", "equal")


def test_windows_without_layer_types_are_those_of_transformers(tmp_path: Path) -> None:
    """Files of earlier versions of transformers have other keys, from which they follow."""
    found = 0
    for name, config in FAMILY_CONFIGS.items():
        keys = config().to_dict()
        if "layer_types" not in keys:
            continue
        del keys["layer_types"]
        (tmp_path / "config.json").write_text(json.dumps(keys))
        _, shape = read_config(tmp_path)
        slides = ["full_attention", "sliding_attention"]
        layer_types = [slides[shape.slides(layer)] for layer in range(shape.layers)]
        assert layer_types == type(config())(**keys).layer_types, name
        found += shape.sliding_window is not None
    assert found >= 6


OLDER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Mistral 0.1": (
        {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 10_000.0},
        {"sliding_window": 4096},
    ),
    "OLMo 3": (
        {
            "model_type": "olmo3",
            "rope_theta": 500_000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "attention_factor": 1.2,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 16,
            },
            "sliding_window": 4096,
        },
        {
            "rotary_base": 500_000.0,
            "rotary_scaling": RotaryScalingConfig(
                type="yarn", factor=8.0, attention_factor=1.2, original_seq_len=16
            ),
            "sliding_rotary": RotaryConfig(base=500_000.0),
            "sliding_window": 4096,
            "attention_pattern": ("sliding", "sliding", "sliding", "full"),
            "qk_norm": "projection",
            "norm_position": "after",
        },
    ),
    "Gemma 3": (
        {
            "model_type": "gemma3_text",
            "rope_theta": 1_000_000,
            "rope_local_base_freq": 10_000,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "sliding_window": 512,
            "sliding_window_pattern": 3,
            "cache_implementation": "hybrid",
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
        },
        {
            "rotary_base": 1_000_000.0,
            "rotary_scaling": RotaryScalingConfig(type="linear", factor=8.0),
            "sliding_rotary": RotaryConfig(base=10_000.0),
            "sliding_window": 512,
            "attention_pattern": ("sliding", "sliding", "full"),
            "qk_norm": "head",
            "norm_position": "both",
            "zero_centered_norms": True,
            "activation": "geglu",
            "embedding_multiplier": 32**0.5,
            "tied_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_config_files_of_version_4_of_transformers(name: str, tmp_path: Path) -> None:
    given, options = OLDER[name]
    sizes = SIZES | {"num_hidden_layers": 8, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(sizes | given))
    assert read_config(tmp_path)[1] == GPTShape(
        vocab=VOCAB, seq_len=SEQ_LEN, layers=8, hidden=32, heads=4, kv_heads=2, ffn=48,
        norm_eps=1e-6, **options
    )  # fmt: skip


def test_another_base_of_all_layers_of_olmo_3_is_refused(tmp_path: Path) -> None:
    """Version 4 of transformers has it in all layers, version 5 in those without a window."""
    config = SIZES | {"model_type": "olmo3", "rope_theta": 10_000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rope_theta: is 10000"):
        read_config(tmp_path)


def test_options_that_no_family_has_are_refused() -> None:
    """Among those that a family has with other values: 1 / √query_pre_attn_scalar is a whole n."""
    _, shape = read_config(imported() / "Gemma 2" / "theirs")
    for options, words in (
        ({"attention_scale": 0.3}, "attention_scale: 0.3"),
        ({"embedding_multiplier": 2.0}, "embedding_multiplier: 2.0"),
        ({"sliding_rotary": RotaryConfig(base=100.0)}, "sliding_rotary"),
    ):
        with pytest.raises(InputError, match=words):
            family_for(replace(shape, **options), "here")


@pytest.mark.distributed
@pytest.mark.parametrize("name", IN_FOUR_RANKS)
def test_logits_of_tensor_parallel_ranks(name: str, record_property: Record) -> None:
    expected = transformers_logits(imported() / name / "theirs", TOKENS)
    ranks = on_four_ranks(name in SLOW)
    for tensor in (2, 4):
        if (name, tensor) in ranks[0]:
            parts = [rank[name, tensor] for rank in ranks[:tensor]]
            found = deviation(torch.cat(parts, -1)[..., :VOCAB], expected)
            record_property(f"tensor {tensor}", found)
            assert found < FP32, tensor


@pytest.mark.distributed
@pytest.mark.parametrize("name", IN_FOUR_RANKS)
def test_training_is_that_of_plain_torch(name: str, record_property: Record) -> None:
    losses = on_four_ranks(name in SLOW)[0][name, "losses"]
    expected = plain_losses(imported() / name / "theirs")
    pairs = zip(losses, expected, strict=True)
    record_property("training", max(abs(found - loss) / loss for found, loss in pairs))
    assert losses == pytest.approx(expected, rel=FP32)
