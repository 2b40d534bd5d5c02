"""Convert a Hugging Face model to a checkpoint from which a run can start."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megaphase.convert.hugging_face.config import read_config
from megaphase.convert.hugging_face.tokenizer import take_tokenizer
from megaphase.convert.hugging_face.weights import HuggingFaceWeights, find_tensors
from megaphase.convert.output import new_folder
from megaphase.convert.weight_import import write_foreign, write_model_section
from megaphase.convert.weights import fp32_bytes
from megaphase.model.shape import GPTShape
from megaphase.tokenizer import Tokenizer
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path

TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Taken:
    """The result of importing a Hugging Face model.

    Attributes:
        model_section: the run file's section for the model, YAML.
        tokenizer: its absolute path; None if there is none that Megaphase can use.
        why_no_tokenizer: a sentence.
        left_out: tokens of the published tokenizer for which the model has no rows.
    """

    shape: GPTShape
    model_section: str
    tokenizer: Path | None
    why_no_tokenizer: str = ""
    left_out: Sequence[str] = ()


def from_hf(
    directory: Path,
    out: Path,
    *,
    trust_pickle: bool,
    workers: int,
    console: Console | None = None,
    no_tokenizer: bool = False,
) -> Taken:
    """Write the model in a directory as the checkpoint `out`, with its tokenizer and model.yaml.

    no_tokenizer: leave out the tokenizer.

    Raises:
        InputError: the model is not supported, or its files are incomplete.
    """
    family, shape = read_config(directory)
    with ExitStack() as open_files:
        found = find_tensors(directory, open_files, trust_pickle=trust_pickle)
        weights = HuggingFaceWeights(directory, family, shape, found)
        with new_folder(out, fp32_bytes(shape)) as folder:
            origin = {
                "format": "Hugging Face",
                "family": family.title,
                "path": str(real_path(directory)),
            }
            problem, fingerprint = "none was asked for", None
            left_out: list[str] = []
            if not no_tokenizer:
                copy = folder / TOKENIZER_FOLDER
                problem, left_out = _take_tokenizer(directory, copy, shape.vocab)
            if not problem:
                fingerprint = Tokenizer.load(folder / TOKENIZER_FOLDER).fingerprint
            write_foreign(
                folder,
                weights,
                shape,
                origin,
                workers=workers,
                console=console,
                tokenizer_hash=fingerprint,
            )
            section = write_model_section(folder, shape)
    tokenizer = None if problem else real_path(out) / TOKENIZER_FOLDER
    return Taken(shape, section, tokenizer, problem, left_out)


def _take_tokenizer(directory: Path, folder: Path, rows: int) -> tuple[str, list[str]]:
    """Return why the tokenizer cannot be used, and if it was copied into the folder, an empty text
    and the tokens that were left out, beyond the model's rows."""
    folder.mkdir()
    try:
        left_out = take_tokenizer(directory, folder, rows)
        if left_out is not None:
            return "", left_out
        problem = f"{directory} has neither a sentencepiece model nor a tokenizer.json"
    except InputError as error:
        problem = str(error)
    shutil.rmtree(folder)
    return problem, []
