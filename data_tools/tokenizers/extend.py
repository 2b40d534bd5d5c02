"""Extend a tokenizer: new tokens, learnt from the text of new languages, after all its own."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from megaphase.convert.hugging_face.tokenizer import write_hf_tokenizer
from megaphase.data_tools.ordered_pool import ordered_map
from megaphase.data_tools.text import InputPath, Reading
from megaphase.data_tools.tokenizers.compare import Comparison, compare
from megaphase.data_tools.tokenizers.extend_unigram import (
    CandidateJob,
    count_words,
    learn_unigram,
    normalized,
    train_candidates,
)
from megaphase.data_tools.tokenizers.extended_files import (
    all_merges,
    extended_bpe,
    extended_model,
    extended_unigram,
    spells_spaces_as_symbol,
    write_json_tokenizer,
)
from megaphase.data_tools.tokenizers.merges import NewPiece, learn_pieces
from megaphase.data_tools.tokenizers.sample import sample_sentences, uses_per_sentence
from megaphase.data_tools.tokenizers.train import (
    check_inputs,
    check_out,
    explained,
    survey_languages,
    tokenizer_written_aside,
)
from megaphase.data_tools.tokenizers.words import words_of_characters, words_of_pre_tokenizer
from megaphase.tokenizer import (
    MODEL_NAME,
    RECORD_NAME,
    TOKENIZER_JSON_NAME,
    Extends,
    Tokenizer,
    TokenizerRecord,
)
from megaphase.tokenizer.hugging_face_files import HuggingFaceFiles
from megaphase.tokenizer.sentencepiece_files import read_proto
from megaphase.tokenizer.tokenizers_files import BYTE_LEVEL, read_tokenizer_json
from megaphase.utils.errors import InputError
from megaphase.utils.files import atomic_write_json, hash_file
from megaphase.utils.progress import ProgressDisplay

_Kind = ModelProto.SentencePiece

_CONFIG_NAME = "tokenizer_config.json"
# Of a tokenizer_config.json whose class's files are made anew.
_KEPT_KEYS = ("model_max_length", "chat_template")
_ANY_LENGTH = 10**30
# More candidates than pieces are trained, since the base has some of them already.
_CANDIDATES = 2
_MORE_CANDIDATES = 1000
_MOST_CANDIDATES = 1_000_000  # as many as sentencepiece begins with
# From this on, more candidates hardly change the choice.
_ENOUGH = 1.25


def extend_tokenizer(
    base_path: Path,
    inputs: Mapping[str, Sequence[InputPath]],
    out: Path,
    *,
    add: int,
    checks: Mapping[str, Sequence[InputPath]] = {},
    reading: Reading = Reading(),  # noqa: B008
    max_sentences: int = 2_000_000,
    temperature: float = 3.3,
    seed: int = 0,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[TokenizerRecord, dict[str, Comparison]]:
    """Add tokens to a tokenizer and write the directory of the new one.

    All ids of the base stay what they are; the new ones follow after all of them, those of added
    and reserved tokens included. Text in whose encoding no new token occurs is encoded as before:

    - BPE: merges are continued on text that the base has encoded, and come after all old ones. So
      a text is encoded as before, and then the new merges apply.
    - unigram: the encoding is the most probable one. If that has no new piece, it was the most
      probable one before.

    The output is a directory of the base's kind: one of Megaphase, or one of Hugging Face with
    Megaphase's record. It depends only on the arguments and the text.

    Args:
        base_path: any tokenizer that `Tokenizer.load` takes.
        inputs: text files of each new language, see `megaphase.data_tools.text`.
        out: the directory to write.
        add: number of new tokens.
        checks: text files of other languages, which are compared only.
        reading, max_sentences, temperature, seed, overwrite, console: see `train_tokenizer`.

    Returns:
        The new tokenizer's record, and for each language how its text is encoded before and after.

    Raises InputError if an argument, the base or a file is invalid, or the text does not support so
    many new tokens.
    """
    check_inputs(inputs)
    if checks:
        check_inputs(checks)
    if both := inputs.keys() & checks.keys():
        problem = f"{min(both)!r} is also given with --input"
        raise InputError("--check", problem, "leave one out: both are compared")
    if out.exists() and base_path.exists() and out.samefile(base_path):
        raise InputError("--out", f"{out} is the tokenizer to extend", "choose another")
    check_out(out, overwrite)
    base = Tokenizer.load(base_path)
    _check_algorithm(base)
    surveys = survey_languages({**inputs, **checks}, reading, console)
    uses = uses_per_sentence({name: surveys[name] for name in inputs}, temperature, max_sentences)

    def sentences() -> Iterator[str]:
        return chain.from_iterable(
            sample_sentences(language, files, reading, uses[language], seed)
            for language, files in inputs.items()
        )

    extension = _Extension(base, add, console)
    with tokenizer_written_aside(out, overwrite) as aside:
        record = extension.write(aside, sentences())
        atomic_write_json(aside / RECORD_NAME, record.model_dump())
        extended = Tokenizer.load(aside)
        comparisons = {
            language: compare(
                base, extended, survey.evaluation_text, held_out=bool(survey.held_out)
            )
            for language, survey in surveys.items()
        }
        languages = {language: it.after for language, it in comparisons.items()}
        record = record.model_copy(update={"languages": languages})
        atomic_write_json(aside / RECORD_NAME, record.model_dump())
    return record, comparisons


def _check_algorithm(base: Tokenizer) -> None:
    algorithm = base.record.algorithm
    if algorithm not in ("unigram", "bpe", BYTE_LEVEL):
        problem = f"its algorithm is {algorithm}"
        raise InputError(base.path, problem, "give a unigram or BPE tokenizer")


def _candidates(job: CandidateJob) -> list[tuple[str, float]]:
    """Train in a separate process, which can be interrupted."""
    try:
        (candidates,) = ordered_map(train_candidates, [job], workers=1)
    except RuntimeError as error:
        raise explained(error, job.vocab_size) from None
    return candidates


class _Extension:
    """Learns new tokens and writes the extended tokenizer."""

    def __init__(self, base: Tokenizer, add: int, console: Console | None) -> None:
        self.base = base
        self.add = add
        self.console = console

    def write(self, directory: Path, sentences: Iterable[str]) -> TokenizerRecord:
        """Write the tokenizer's files and return its record, without languages."""
        if self.base.record.library == "tokenizers":
            return self._write_json(directory, sentences)
        model = read_proto(self.base.path)
        if self.base.record.algorithm == "unigram":
            pieces = self._unigram(model, sentences)
        else:
            pieces = self._sentencepiece_bpe(model, sentences)
        extended = extended_model(model, self.base, pieces)
        (directory / MODEL_NAME).write_bytes(extended.SerializeToString())
        record = self._record(hash_file(directory / MODEL_NAME), sentencepiece.__version__)
        self._write_hugging_face(directory, model, pieces, record)
        return record

    def _record(self, tokenizer_hash: str, library_version: str | None) -> TokenizerRecord:
        base = self.base
        return base.record.model_copy(
            update={
                "library_version": library_version,
                "vocab_size": base.vocab_size + self.add,
                "tokenizer_hash": tokenizer_hash,
                "languages": {},
                "extends": Extends(tokenizer_hash=base.fingerprint, vocab_size=base.vocab_size),
            }
        )

    def _write_json(self, directory: Path, sentences: Iterable[str]) -> TokenizerRecord:
        encoder = read_tokenizer_json(self.base.path)[0].encoder
        files = HuggingFaceFiles(self.base.path)
        known = files.pieces.keys() | files.added_tokens.keys()
        if self.base.record.algorithm == BYTE_LEVEL:
            words, absent = words_of_pre_tokenizer(encoder, sentences), set[str]()
        else:
            unknown = {files.whole["model"].get("unk_token")} - {None}
            unmerged = files.added_tokens.keys() | unknown
            words, absent = words_of_characters(encoder, sentences, known, unmerged)
        learnt = self._learn(words, absent, known)
        merges = (pair for piece in learnt for pair in piece.pairs)
        pieces = [piece.text for piece in learnt]
        whole = extended_bpe(files, self.base.vocab_size, pieces, merges)
        write_json_tokenizer(directory, whole, self.base)
        found = read_tokenizer_json(directory)[1]
        return self._record(found.tokenizer_hash, found.library_version)

    def _sentencepiece_bpe(self, model: ModelProto, sentences: Iterable[str]) -> dict[str, float]:
        processor = SentencePieceProcessor(model_proto=model.SerializeToString())
        known = {piece.piece for piece in model.pieces}
        normal = {
            piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == _Kind.NORMAL
        }
        words, absent = words_of_characters(processor, sentences, known, known - normal.keys())
        # An old piece that old merges do not make must not be made by one of new pieces and a rest.
        ends = (
            end
            for text, token in normal.items()
            if self.base.encode_spelling(self.base.spelling(token)) != [token]
            for place in range(1, len(text))
            for end in (text[:place], text[place:])
        )
        learnt = self._learn(words, absent, known.union(ends))
        first = min(piece.score for piece in model.pieces) - 1
        return {piece.text: first - place for place, piece in enumerate(learnt)}

    def _learn(
        self,
        words: Mapping[tuple[str, ...], int],
        absent: Collection[str],
        taken: Collection[str],
    ) -> list[NewPiece]:
        found: list[NewPiece] = []
        console = self.console or Console(quiet=True)
        with ProgressDisplay(console, BarColumn(), TaskProgressColumn()) as display:
            bar = display.add_bar("learning tokens", self.add)
            for piece in islice(learn_pieces(words, absent, taken), self.add):
                found.append(piece)
                bar.update(completed=len(found))
                display.line_when_due(lambda: f"learning tokens: {len(found):,} of {self.add:,}")
        self._check_count(len(found))
        return found

    def _unigram(self, model: ModelProto, sentences: Iterable[str]) -> dict[str, float]:
        text = list(normalized(model, sentences))
        words = count_words(text)
        size = min(_CANDIDATES * self.add + _MORE_CANDIDATES, _MOST_CANDIDATES)
        known = {piece.piece for piece in model.pieces}
        with (self.console or Console(quiet=True)).status("learning tokens"):
            while True:
                job = CandidateJob(model.SerializeToString(), text, size)
                candidates = _candidates(job)
                new = {piece: score for piece, score in candidates if piece not in known}
                if len(new) >= _ENOUGH * self.add or len(candidates) < 0.9 * size:
                    break
                size *= 2
            pieces = learn_unigram(model, words, new, self.add)
        self._check_count(len(pieces))
        return pieces

    def _check_count(self, found: int) -> None:
        if found < self.add:
            problem = (
                f"{self.add:,} is more than this text supports, which uses {found:,} new tokens"
            )
            raise InputError("--add", problem, "give more text or choose a smaller number")

    def _write_hugging_face(
        self,
        directory: Path,
        model: ModelProto,
        pieces: Mapping[str, float],
        record: TokenizerRecord,
    ) -> None:
        """Write the other files of a Hugging Face directory, if the base is one."""
        base = self.base
        names = (_CONFIG_NAME, TOKENIZER_JSON_NAME)
        if not any((base.path / name).is_file() for name in names):
            return
        files = HuggingFaceFiles(base.path)
        if (base.path / TOKENIZER_JSON_NAME).exists() and spells_spaces_as_symbol(files):
            if isinstance(files.whole["model"]["vocab"], list):
                whole = extended_unigram(files, base.vocab_size, pieces)
            else:
                normal = [it.piece for it in model.pieces if it.type == _Kind.NORMAL]
                merges = all_merges(list(pieces), normal)
                whole = extended_bpe(files, base.vocab_size, pieces, merges)
            write_json_tokenizer(directory, whole, base)
            return
        with TemporaryDirectory(dir=directory) as name:
            alone = Path(name)
            shutil.copyfile(directory / MODEL_NAME, alone / MODEL_NAME)
            atomic_write_json(alone / RECORD_NAME, record.model_dump())
            write_hf_tokenizer(Tokenizer.load(alone), directory, max_length=_ANY_LENGTH)
        kept = {name: files.config[name] for name in _KEPT_KEYS if name in files.config}
        config = HuggingFaceFiles(directory).config | kept
        atomic_write_json(directory / _CONFIG_NAME, config)
