"""`megaphase translate`: evaluate a checkpoint on the translation tasks of a run file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megaphase.checkpoint.names import find_for_run
from megaphase.config.run import RunConfig
from megaphase.convert.source import open_source
from megaphase.convert.source_tokenizer import load_tokenizer
from megaphase.decoding.options import Decoding
from megaphase.generation.model import Precision, load_model
from megaphase.generation.pairs import PairsSplit, held_out_pairs, translation_tasks
from megaphase.generation.progress import counting_progress
from megaphase.generation.translation import BleuTokenizer, Scores, Translation, score, translate
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_text


@dataclass(frozen=True)
class TranslationTest:
    """The options of an evaluation.

    Attributes:
        samples: number of pairs of each task.
        split: from which they are taken.
        batch: number of sources that are translated at a time.
        precision: precision of weights and arithmetic; None: the run's.
        verify: whether to verify the hashes of the checkpoint's files.
    """

    samples: int
    how: Decoding
    batch: int = 16
    precision: Precision | None = None
    bleu_tokenizer: BleuTokenizer = "13a"
    verify: bool = True
    split: PairsSplit = "validation"


@dataclass(frozen=True)
class TranslationResults:
    """The results of a checkpoint after `step` steps, by task."""

    step: int
    translations: dict[str, list[Translation]]
    scores: dict[str, Scores]


def evaluate_translation(
    config: RunConfig,
    checkpoint: str,
    tasks: Sequence[str],
    test: TranslationTest,
    console: Console,
    *,
    average: bool = False,
) -> TranslationResults:
    """Translate held-out sources of tasks, by default of all translation tasks, and score them.

    Args:
        checkpoint: a NAME in the run, RUN@NAME of another one, or a path.
        average: translate with the average of the weights that it holds.

    Raises:
        InputError: the user's input is invalid; raised before anything is translated.
    """
    source = open_source(str(find_for_run(config.output, checkpoint)), average=average)
    tokenizer = load_tokenizer(source, config.tokenizer)
    named = tasks or translation_tasks(config)
    if not named:
        raise InputError(config.where("tasks"), "there is no translation task", "add one")
    pairs = {
        task: held_out_pairs(config, task, tokenizer, test.samples, test.split) for task in named
    }
    model = load_model(source, test.precision, verify=test.verify)
    translations = {}
    for task, chosen in pairs.items():
        with counting_progress(console, task, len(chosen)) as advance:
            translations[task] = translate(
                model, chosen, tokenizer, test.how, batch=test.batch, advance=advance
            )
    scores = {task: score(found, test.bleu_tokenizer) for task, found in translations.items()}
    return TranslationResults(source.state["step"], translations, scores)


def write_translations(path: Path, translations: Mapping[str, Sequence[Translation]]) -> None:
    """Write one JSON object per line: task, source, reference, hypothesis, ending."""
    rows = [
        {
            "task": task,
            "source": each.pair.source,
            "reference": each.pair.reference,
            "hypothesis": each.hypothesis,
            "ending": each.ending,
        }
        for task, found in translations.items()
        for each in found
    ]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic_write_text(path, "".join(lines))


def scores_as_json(results: TranslationResults) -> dict[str, Any]:
    """Return the step and the scores by task."""
    scores = {name: asdict(each) for name, each in results.scores.items()}
    return {"step": results.step, "translation": scores}


def scores_table(results: TranslationResults) -> Table:
    """Return a table of the scores with one row per task."""
    title = f"Translations of held-out sources at step {results.step:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    for figure in ("BLEU", "chrF", "pairs", "cut off", "no room"):
        table.add_column(figure, justify="right")
    for task, each in results.scores.items():
        counts = (f"{count:,}" for count in (each.pairs, each.cut_off, each.no_room))
        table.add_row(task, f"{each.bleu:.2f}", f"{each.chrf:.2f}", *counts)
    return table


def signature_lines(results: TranslationResults) -> list[str]:
    """Return sacrebleu's signatures of the two scores, which are the same for all tasks."""
    first = next(iter(results.scores.values()))
    return [f"BLEU: {first.bleu_signature}", f"chrF: {first.chrf_signature}"]
