"""Load the tokenizer of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megaphase.checkpoint.state import TOKENIZER_HASH
from megaphase.convert.hugging_face.from_hf import TOKENIZER_FOLDER
from megaphase.convert.source import Source
from megaphase.tokenizer import Tokenizer
from megaphase.training.run_directory import RunDirectory
from megaphase.utils.errors import InputError
from megaphase.utils.files import read_json
from megaphase.utils.remote_files import is_url
from megaphase.utils.run_files import CHECKPOINTS

_RIGHT_TOKENIZER = "give the tokenizer that the model was trained with"


def load_tokenizer(source: Source, given: Path | None, option: str = "--tokenizer") -> Tokenizer:
    """Load the given tokenizer, or by default that of the run or of the imported model.

    option: with which a user gives it.

    Raises:
        InputError: none is known, it has tokens that the model does not know, or the checkpoint
            records that it was made with another one.
    """
    path = given or _own_tokenizer(source, option)
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > source.shape.vocab:
        raise InputError(
            path,
            f"has {tokenizer.vocab_size:,} tokens, the model's vocabulary {source.shape.vocab:,}",
            _RIGHT_TOKENIZER,
        )
    made_with = source.state.get(TOKENIZER_HASH)
    if made_with is not None and made_with != tokenizer.fingerprint:
        raise other_tokenizer(source, tokenizer, made_with, "" if given else f"give {option}")
    return tokenizer


def check_tokenizer_known(checkpoint: str, given: Path | None, option: str = "--tokenizer") -> None:
    """Raise InputError for a checkpoint in a store without a given tokenizer, before it is fetched:
    its run directory, which names the tokenizer, is not there."""
    if given is None and is_url(checkpoint):
        problem = "lies in a store, without its run directory, so its tokenizer is not known"
        raise InputError(checkpoint, problem, f"give {option}")


def shared_tokenizer(sources: Sequence[Source]) -> Tokenizer | None:
    """Return the tokenizer with which all these checkpoints were made, None if it is not known of
    all of them or not found."""
    found: list[Tokenizer] = []
    made_with: set[str | None] = set()
    for source in sources:
        recorded = source.state.get(TOKENIZER_HASH)
        try:
            found.append(load_tokenizer(source, None))
        except InputError:
            made_with.add(recorded)
        else:
            made_with.add(found[-1].fingerprint)
    return found[0] if found and len(made_with) == 1 else None


def other_tokenizer(
    source: Source, tokenizer: Tokenizer, made_with: str, remedy: str = ""
) -> InputError:
    """Return the error that a tokenizer is not the one with which a checkpoint was made.

    made_with: the fingerprint of that one. remedy: by default to give that one.
    """
    return InputError(
        tokenizer.path,
        f"has the fingerprint {tokenizer.fingerprint}, but {source.folder} was made with the "
        f"tokenizer {made_with}",
        remedy or _RIGHT_TOKENIZER,
    )


def prompt_start(source: Source, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens before a prompt that begins a document: BOS, if the model was trained with
    it, as its run recorded or, before its first run, as the files of its tokenizer say."""
    is_of_run = "plan" in source.state
    own = tokenizer.bos if tokenizer.adds_bos else None
    bos = source.state.get("bos") if is_of_run else own
    return [] if bos is None else [bos]


def _own_tokenizer(source: Source, option: str) -> Path:
    """Return the tokenizer of the run that wrote a checkpoint, or of the model it came from."""
    checkpoint = source.folder
    if (checkpoint / TOKENIZER_FOLDER).is_dir():
        return checkpoint / TOKENIZER_FOLDER
    run_file = RunDirectory(checkpoint.parent.parent).run_file
    if checkpoint.parent.name != CHECKPOINTS or not run_file.is_file():
        problem = "is in no run directory, so its tokenizer is not known"
        if checkpoint.parent.name != CHECKPOINTS and "origin" in source.state:
            problem = "was converted without a tokenizer"
        raise InputError(checkpoint, problem, f"give {option}")
    try:
        tokenizer = Path(read_json(run_file)["tokenizer"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(run_file, "is damaged", f"give {option}") from None
    if not tokenizer.exists():
        raise InputError(f"{run_file}: tokenizer", f"{tokenizer} is gone", f"give {option}")
    return tokenizer
