"""Tasks of lm-evaluation-harness in local files, and its own results for an exported model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

# Before `datasets` is imported.
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"

CHOICE, LETTERS, TEXT, PERPLEXITY = "tiny_choice", "tiny_letters", "tiny_text", "tiny_perplexity"
TASKS = (CHOICE, LETTERS, TEXT, PERPLEXITY)
DOCUMENTS = 7


def write_tasks(folder: Path, texts: list[str]) -> Path:
    """Write a folder with four tasks (choices of texts and of letters, texts to be generated,
    perplexity) and two that cannot be run: `long`, for small models, and `far`, without network.

    texts: at least DOCUMENTS; some contexts are longer than a small model's seq_len.
    """
    folder.mkdir(parents=True)
    words = [text.split() for text in texts[:DOCUMENTS]]
    rows = [
        {
            "question": " ".join(each[: 4 + 6 * number]) + (" " if number == 2 else ""),
            "choices": [" ".join(each[-3:]), " ".join(words[number - 1][-4:]), each[0]],
            "answer": number % 3,
            "text": " ".join(each) if number else each[0],
        }
        for number, each in enumerate(words)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "metadata": {"version": 1.0},
    }
    mean = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in
            ("acc", "acc_norm")]  # fmt: skip
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{question}}",
              "doc_to_target": "{{answer}}", "metric_list": mean}  # fmt: skip
    tasks: dict[str, dict[str, Any]] = {
        CHOICE: {**choice, "doc_to_choice": "{{choices}}"},
        LETTERS: {**choice, "doc_to_choice": ["a", "b", "c"]},
        TEXT: {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["a", "\n"], "max_gen_toks": 12, "do_sample": False},
            "metric_list": [{"metric": "chrf", "aggregation": "chrf", "higher_is_better": True}],
        },
        PERPLEXITY: {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }
    tasks["long"] = tasks[TEXT] | {"generation_kwargs": {"until": ["a"], "max_gen_toks": 40}}
    tasks["far"] = tasks[CHOICE] | {"dataset_path": "nobody/nothing", "dataset_kwargs": {}}
    for name, task in tasks.items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"task": name, **common, **task}, sort_keys=False))
    return folder


@contextmanager
def _accelerate() -> Iterator[None]:
    """lm_eval's model for transformers imports accelerate, and uses nothing of it for a model that
    it is given."""
    if find_spec("accelerate") is not None:
        yield
        return
    module, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
    for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
        setattr(module, name, None)
    utils.get_max_memory = None  # type: ignore[attr-defined]
    sys.modules |= {"accelerate": module, "accelerate.utils": utils}
    try:
        yield
    finally:
        del sys.modules["accelerate"], sys.modules["accelerate.utils"]


def transformers_language_model() -> Any:
    """The class behind `lm_eval --model hf`."""
    with _accelerate():
        from lm_eval.models.huggingface import HFLM
    return HFLM


def results_of_transformers(model: Path, tasks: Path, **options: Any) -> dict[str, Any]:
    """The results of `lm_eval --model hf` on an exported model in fp32, with all samples."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    served = transformers_language_model()(pretrained=loaded, tokenizer=str(model), batch_size=3)
    return results_of(served, tasks, **options)


def results_of(model: Any, tasks: Path, **options: Any) -> dict[str, Any]:
    """lm_eval's results for one of its models, with all samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(
        model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, **options
    )
    return found
