"""Read a sentencepiece model: Megaphase's directory, the model alone, or Hugging Face's directory.

| path                                | EOD                               | tags |
| ----------------------------------- | --------------------------------- | --- |
| a directory made by Megaphase       | in its record                     | in its record |
| a sentencepiece model, as `a.model` | the model's EOS                   | other control symbols |
| a Hugging Face directory with one   | its `eos_token`, or the model's¹  | these and added tokens |

¹ Where `eos_token` ends a turn of a dialogue, the end of a text: `HuggingFaceFiles.document_end`.

The ids are always the model's own. A tag's name is its text without < and >. Models such as Gemma's
have control tokens among the symbols that text may encode to; those that a Hugging Face directory
marks as special, that have a role in it, or that are reserved, become control symbols here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import SentencePieceProcessor

from megaphase.tokenizer.hugging_face_files import RESERVED, HuggingFaceFiles, tag_name
from megaphase.tokenizer.record import (
    MODEL_NAME,
    RECORD_NAME,
    REMEDY,
    SPACE_SYMBOL,
    TOKENIZER_JSON_NAME,
    TokenizerRecord,
)
from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_file, hash_json

HUGGING_FACE_MODEL_NAMES = (
    MODEL_NAME,
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
)
# Classes of transformers that renumber the pieces of their model: in fairseq's order, with an
# offset, or by a vocabulary file; in lower case, without "Tokenizer".
_OWN_NUMBERS = frozenset(
    (
        *("bartpho", "bertjapanese", "bigbirdpegasus", "camembert", "erniem", "layoutxlm"),
        *("m2m100", "marian", "mbart", "mbart50", "mluke", "nllb", "nllbmoe", "pegasus"),
        *("pegasusx", "plbart", "seamlessm4t", "seamlessm4tv2", "speech2text", "speechtotext"),
        *("xglm", "xlmprophetnet", "xlmroberta", "xlmrobertaxl", "xmod"),
    )
)
_CONTROL = re.compile(r"<.*>|\[.*\]", re.DOTALL)  # what added tokens look like that no text has
# Classes that change the text (case, quotes, spaces, accents) before the model encodes it.
_OWN_TEXT = frozenset(("albert", "cpm", "gptsw3", "siglip", "xlnet"))


def read_own(
    directory: Path, record: TokenizerRecord
) -> tuple[SentencePieceProcessor, TokenizerRecord]:
    """Load the model of a directory made by Megaphase.

    Raises InputError if `tokenizer.model` is missing, damaged or not the one that the record
    describes, or the record names tokens that the model does not have.
    """
    model = directory / MODEL_NAME
    if not model.is_file():
        raise InputError(model, "no such file", REMEDY)
    if hash_file(model) != record.tokenizer_hash:
        raise InputError(model, f"is not the model that {RECORD_NAME} describes", REMEDY)
    processor = _load_model(model)
    if processor.get_piece_size() != record.vocab_size:
        problem = f"vocab_size is {record.vocab_size}, the model's {processor.vocab_size()}"
        raise InputError(directory / RECORD_NAME, problem, REMEDY)
    _check_control_tokens(directory / RECORD_NAME, processor, record)
    return processor, record


def _check_control_tokens(
    path: Path, processor: SentencePieceProcessor, record: TokenizerRecord
) -> None:
    """Raise InputError unless EOD and the tags are distinct control tokens of the model."""
    tags = {f"tags.{name}": token for name, token in record.tags.items()}
    reserved = {f"reserved_tags.{i}": token for i, token in enumerate(record.reserved_tags)}
    seen: set[int] = set()
    for key, token in ({"eod": record.eod} | tags | reserved).items():
        if not 0 <= token < record.vocab_size or not processor.is_control(token) or token in seen:
            problem = f"{key}: {token} is not a control token of the model, or is given twice"
            raise InputError(path, problem, REMEDY)
        seen.add(token)


def read_model_alone(path: Path) -> tuple[SentencePieceProcessor, TokenizerRecord]:
    """Load a sentencepiece model without other files; raise InputError if it has no EOS."""
    processor = _load_model(path)
    if processor.eos_id() < 0:
        remedy = "train the model with an EOS symbol (sentencepiece's eos_id)"
        raise InputError(path, "the model has no symbol that can end a document", remedy)
    control = _control_symbols(processor)
    return processor, _record(path, processor, control, processor.eos_id(), None, {}, ())


def read_hugging_face(
    directory: Path, model: Path
) -> tuple[SentencePieceProcessor, TokenizerRecord]:
    """Load the sentencepiece model of a Hugging Face directory.

    Raises InputError if there is no EOD, or the tokenizer assigns other ids than its model.
    """
    processor = _load_model(model)
    files = HuggingFaceFiles(directory)
    if difference := _difference(files, processor):
        remedy = f"give {model} to use the model without its class"
        raise InputError(directory, difference, remedy)
    _refuse_other_pieces(directory, model, files, processor)
    processor, made_control = _with_control_symbols(processor, files)
    control = _control_symbols(processor)
    end = files.document_end(control.keys() | files.special)
    eod = _id_of(end, files.added_tokens, processor)
    if eod is None:
        eod = processor.eos_id()
    if eod < 0:
        remedy = "name an eos_token in tokenizer_config.json"
        raise InputError(directory, "has no token that can end a document", remedy)
    bos, *others = (
        _id_of(files.special_token(f"{kind}_token"), files.added_tokens, processor)
        for kind in ("bos", "unk", "pad")
    )
    known = [token for token in (bos, *others) if token is not None]
    added, adds_bos = files.added_tokens, files.adds_bos()
    return processor, _record(
        model, processor, control, eod, bos, added, known, adds_bos, made_control
    )


def read_proto(path: Path) -> Any:
    """Return the ModelProto with which `Tokenizer.load(path)` encodes, of a path that it reads with
    sentencepiece."""
    processor = _load_model(model_file(path))
    if path.is_dir() and not (path / RECORD_NAME).exists():
        processor, _ = _with_control_symbols(processor, HuggingFaceFiles(path))
    return _proto_of(processor)


def _proto_of(processor: SentencePieceProcessor) -> Any:
    # Imported here because Megaphase's own tokenizers do not need it.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    return ModelProto.FromString(processor.serialized_model_proto())


def _control_symbols(processor: SentencePieceProcessor) -> dict[str, int]:
    pieces = range(processor.get_piece_size())
    return {processor.id_to_piece(i): i for i in pieces if processor.is_control(i)}


def _with_control_symbols(
    processor: SentencePieceProcessor, files: HuggingFaceFiles
) -> tuple[SentencePieceProcessor, list[int]]:
    """Return the model with control symbols in place of the pieces that are control tokens by the
    directory's files, and the ids of these pieces."""
    special = {*files.special, *files.roles().values()}
    pieces = map(processor.id_to_piece, range(processor.get_piece_size()))
    found = [
        token
        for token, text in enumerate(pieces)
        if (text in special or RESERVED.fullmatch(text))
        and not (processor.is_control(token) or processor.is_unknown(token))
        and not (processor.is_byte(token) or processor.is_unused(token))
    ]
    if not found:
        return processor, []
    model = _proto_of(processor)
    for token in found:
        model.pieces[token].type = model.SentencePiece.CONTROL
    return SentencePieceProcessor(model_proto=model.SerializeToString()), found


def _difference(files: HuggingFaceFiles, processor: SentencePieceProcessor) -> str | None:
    """Return why the tokenizer's ids would differ from those of the model alone, or None."""
    name = files.class_name
    short = "".join(filter(str.isalnum, name.lower())).removesuffix("fast")
    short = short.removesuffix("tokenizer")
    if short in _OWN_TEXT or files.config.get("do_lower_case"):
        return f"{name} changes the text before its sentencepiece model encodes it"
    if files.config.get("add_prefix_space") is False and adds_prefix_space(processor):
        return "its add_prefix_space is false, but its sentencepiece model adds a space"
    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    moved = (
        pieces.get(text, number) != number
        for text, number in (*files.added_tokens.items(), *files.pieces.items())
    )
    if short in _OWN_NUMBERS or any(moved):
        return f"{name or 'its class'} numbers the tokens differently from its sentencepiece model"
    return None


def _refuse_other_pieces(
    directory: Path, model: Path, files: HuggingFaceFiles, processor: SentencePieceProcessor
) -> None:
    """Raise InputError if transformers encodes texts to tokens that only the other files have, as
    where somebody has added words to the tokenizer."""
    count, added = processor.get_piece_size(), files.added_tokens
    found = [text for text, i in files.pieces.items() if i >= count and text not in added]
    found += [
        text
        for text, i in added.items()
        if i >= count and text not in files.special and not _CONTROL.fullmatch(text)
    ]
    if found:
        more = len(found) - 1
        others = f" and {more:,} more token{'s' * (more > 1)}" if more else ""
        problem = f"has {found[0]!r}{others}, to which its model {model.name} encodes no text"
        remedy = f"remove {model.name}, so that {TOKENIZER_JSON_NAME} is read"
        if not files.whole:
            made = f"save it once more with transformers, which writes {TOKENIZER_JSON_NAME}"
            remedy = f"{made}, and {remedy}"
        raise InputError(directory, problem, remedy)


def adds_prefix_space(processor: SentencePieceProcessor) -> bool:
    """Return whether the model adds a space before every text."""
    return str(processor.encode("a", out_type=str)[0]).startswith(SPACE_SYMBOL)


def _record(
    model: Path,
    processor: SentencePieceProcessor,
    control: dict[str, int],
    eod: int,
    bos: int | None,
    added_tokens: dict[str, int],
    special: Sequence[int],
    adds_bos: bool = False,
    made_control: Sequence[int] = (),
) -> TokenizerRecord:
    pieces = processor.get_piece_size()
    if bos is None and processor.bos_id() >= 0:
        bos = processor.bos_id()
    beyond = {text: i for text, i in added_tokens.items() if i >= pieces}
    roles = {eod, processor.bos_id(), processor.eos_id(), processor.unk_id(), *special}
    roles.add(processor.pad_id())
    algorithm, normalization = _properties(processor)
    tokenizer_hash = hash_file(model)
    if beyond or made_control or eod != processor.eos_id():
        determines = {"model": tokenizer_hash, "eod": eod, "added": beyond}
        if made_control:
            determines["control"] = list(made_control)
        tokenizer_hash = hash_json(determines)
    free = {i: text for text, i in (control | beyond).items() if i not in roles}
    reserved = {i for i in made_control if i in free and RESERVED.fullmatch(free[i])}
    return TokenizerRecord(
        library_version=sentencepiece.__version__,
        algorithm=algorithm,
        normalization=normalization,
        vocab_size=max([pieces - 1, *beyond.values()]) + 1,
        eod=eod,
        bos=bos,
        adds_bos=adds_bos and bos is not None,
        tags={tag_name(text): i for i, text in free.items() if i not in reserved},
        reserved_tags=sorted(reserved),
        tokenizer_hash=tokenizer_hash,
        languages={},
    )


def _properties(processor: SentencePieceProcessor) -> tuple[str, list[str]]:
    """Return the model's algorithm and what it does to a text before it encodes it."""
    model = _proto_of(processor)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    steps = []
    if normalizer.precompiled_charsmap:
        steps.append(str(normalizer.name) or "own rules")
    if normalizer.add_dummy_prefix:
        steps.append("a space before the text")
    if normalizer.remove_extra_whitespaces:
        steps.append("without extra spaces")
    return str(trainer.ModelType.Name(trainer.model_type)).lower(), steps


def _load_model(path: Path) -> SentencePieceProcessor:
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        problem = "is not a sentencepiece model"
        raise InputError(path, problem, "give one, or a directory that contains one") from None
    if _spells_spaces(processor):
        problem = "has no piece for the space, so a space would be decoded as U+2581"
        raise InputError(path, problem, REMEDY)
    return processor


def _spells_spaces(processor: SentencePieceProcessor) -> bool:
    """Return whether byte fallback spells a space as the three bytes of U+2581, so that the ids of
    a space and of that character are the same."""
    space = processor.piece_to_id(SPACE_SYMBOL)
    is_piece = processor.id_to_piece(space) == SPACE_SYMBOL and not processor.is_unused(space)
    return not is_piece and processor.is_byte(processor.piece_to_id("<0x20>"))


def model_file(path: Path) -> Path:
    """Return the sentencepiece model that `Tokenizer.load` reads from a path."""
    if path.is_file():
        return path
    return next(path / name for name in HUGGING_FACE_MODEL_NAMES if (path / name).is_file())


def _id_of(
    text: str | None, added: dict[str, int], processor: SentencePieceProcessor
) -> int | None:
    """Return the id of a token given its text, or None if neither the model nor `added` has it."""
    if text is None or text in added:
        return None if text is None else added[text]
    token = processor.piece_to_id(text)
    return token if processor.id_to_piece(token) == text else None
