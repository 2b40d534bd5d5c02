"""Read the files of a tokenizer: Megaphase's directory, a sentencepiece model, or Hugging Face's.

| path                                | EOD                               | tags |
| ----------------------------------- | --------------------------------- | --- |
| a directory made by Megaphase       | in its record                     | in its record |
| a sentencepiece model, as `a.model` | the model's EOS                   | other control symbols |
| a Hugging Face directory with one   | its `eos_token`, or the model's   | these and added tokens |

The ids are always the model's own. A tag's name is its text without < and >.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from sentencepiece import SentencePieceProcessor

from megaphase.utils.errors import InputError
from megaphase.utils.files import hash_file, hash_json, read_json
from megaphase.utils.json_models import read_record

MODEL_NAME = "tokenizer.model"
RECORD_NAME = "megaphase_tokenizer.json"

# sentencepiece writes a space as this character, and therefore reads the character as a space.
SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"

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
# Classes that change the text (case, quotes, spaces, accents) before the model encodes it.
_OWN_TEXT = frozenset(("albert", "cpm", "gptsw3", "siglip", "xlnet"))

_REMEDY = "make the tokenizer with `megaphase tokenizer train`"


class Fertility(BaseModel):
    """Into how many tokens a tokenizer splits one language's text; few bytes per token are bad."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_token: float
    tokens_per_word: float
    spelled: float | None = None
    """Fraction of the tokens that encode characters missing from the vocabulary, as bytes or
    <unk>."""
    sample_bytes: int
    held_out: bool
    """Whether the sample was held out from the training text."""


class TokenizerRecord(BaseModel):
    """`megaphase_tokenizer.json`, or the equivalent for a tokenizer from elsewhere.

    Attributes:
        algorithm: sentencepiece's algorithm: unigram, bpe, word or char.
        vocab_size: number of ids, added tokens included.
        eod: the id that ends a document.
        tags: the id of each named control token.
        reserved_tags: ids of unnamed control tokens, for tags that a later task needs.
        tokenizer_hash: digest of the model file and, if EOD or added tokens come from other files,
            of these too.
        languages: how well each language is served, if Megaphase trained the tokenizer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    algorithm: str
    vocab_size: int
    eod: int
    tags: dict[str, int]
    reserved_tags: list[int]
    tokenizer_hash: str
    languages: dict[str, Fertility]


def read_tokenizer(path: Path) -> tuple[SentencePieceProcessor, TokenizerRecord]:
    """Load the model at `path` and its record.

    Raises InputError if a file is missing or damaged, `tokenizer.model` is not the one that the
    record describes, the record names tokens that the model does not have, there is no EOD, the
    model spells a space in bytes, or a Hugging Face tokenizer assigns other ids than its model.
    """
    if path.is_file():
        return _read_model_alone(path)
    if path.is_dir() and not (path / RECORD_NAME).exists():
        for name in HUGGING_FACE_MODEL_NAMES:
            if (path / name).is_file():
                return _read_hugging_face(path, path / name)
        if (path / "tokenizer.json").exists():
            problem = "contains only a tokenizer.json and no sentencepiece model"
            raise InputError(path, problem, "give a tokenizer that has a tokenizer.model")
    return _read_own(path)


def _read_own(directory: Path) -> tuple[SentencePieceProcessor, TokenizerRecord]:
    record = read_record(directory / RECORD_NAME, TokenizerRecord, _REMEDY)
    model = directory / MODEL_NAME
    if not model.is_file():
        raise InputError(model, "no such file", _REMEDY)
    if hash_file(model) != record.tokenizer_hash:
        raise InputError(model, f"is not the model that {RECORD_NAME} describes", _REMEDY)
    processor = _load_model(model)
    if processor.get_piece_size() != record.vocab_size:
        problem = f"vocab_size is {record.vocab_size}, the model's {processor.vocab_size()}"
        raise InputError(directory / RECORD_NAME, problem, _REMEDY)
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
            raise InputError(path, problem, _REMEDY)
        seen.add(token)


def _read_model_alone(
    path: Path,
) -> tuple[SentencePieceProcessor, TokenizerRecord]:
    processor = _load_model(path)
    if processor.eos_id() < 0:
        remedy = "train the model with an EOS symbol (sentencepiece's eos_id)"
        raise InputError(path, "the model has no symbol that can end a document", remedy)
    return processor, _record(path, processor, processor.eos_id(), {}, ())


def _read_hugging_face(
    directory: Path, model: Path
) -> tuple[SentencePieceProcessor, TokenizerRecord]:
    processor = _load_model(model)
    files = _HuggingFaceFiles(directory)
    if difference := _difference(files, processor):
        remedy = f"give {model} to use the model without its class"
        raise InputError(directory, difference, remedy)
    eod = _id_of(files.special_token("eos_token"), files.added_tokens, processor)
    if eod is None:
        eod = processor.eos_id()
    if eod < 0:
        remedy = "name an eos_token in tokenizer_config.json"
        raise InputError(directory, "has no token that can end a document", remedy)
    others = [files.special_token(f"{kind}_token") for kind in ("bos", "unk", "pad")]
    ids = [_id_of(text, files.added_tokens, processor) for text in others]
    known = [token for token in ids if token is not None]
    return processor, _record(model, processor, eod, files.added_tokens, known)


class _HuggingFaceFiles:
    """The information about the tokenizer in a Hugging Face directory, apart from the model.

    Attributes:
        added_tokens: the id of each token added to the model's, or named among them.
        pieces: the ids that tokenizer.json assigns to the pieces; empty if there is no such file.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = _read_object(directory / "tokenizer_config.json")
        self._special_tokens = _read_object(directory / "special_tokens_map.json")
        self.added_tokens: dict[str, int] = {}
        self.pieces: dict[str, int] = {}
        try:
            self._read_tokens()
        except (AttributeError, KeyError, TypeError, ValueError):
            problem = "its tokens are not in the format of transformers"
            raise InputError(directory, problem, "copy the tokenizer again") from None

    def _read_tokens(self) -> None:
        for text, token in _read_object(self.directory / "added_tokens.json").items():
            self.added_tokens[text] = int(token)
        for token, described in (self.config.get("added_tokens_decoder") or {}).items():
            self.added_tokens[described["content"]] = int(token)
        whole = _read_object(self.directory / "tokenizer.json")
        for described in whole.get("added_tokens") or []:
            self.added_tokens[described["content"]] = int(described["id"])
        vocabulary = (whole.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, dict):
            self.pieces = vocabulary
        else:
            self.pieces = {piece: number for number, (piece, _) in enumerate(vocabulary)}

    def special_token(self, name: str) -> str | None:
        """Return the text of a special token such as `eos_token`."""
        return _text_of(self.config.get(name) or self._special_tokens.get(name))

    @property
    def class_name(self) -> str:
        """Return the tokenizer's class or, if it is not named, the model type."""
        named = self.config.get("tokenizer_class")
        return named or _read_object(self.directory / "config.json").get("model_type") or ""


def _difference(files: _HuggingFaceFiles, processor: SentencePieceProcessor) -> str | None:
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


def adds_prefix_space(processor: SentencePieceProcessor) -> bool:
    """Return whether the model adds a space before every text."""
    return str(processor.encode("a", out_type=str)[0]).startswith(SPACE_SYMBOL)


def _record(
    model: Path,
    processor: SentencePieceProcessor,
    eod: int,
    added_tokens: dict[str, int],
    special: Sequence[int],
) -> TokenizerRecord:
    pieces = processor.get_piece_size()
    beyond = {text: i for text, i in added_tokens.items() if i >= pieces}
    control = {processor.id_to_piece(i): i for i in range(pieces) if processor.is_control(i)}
    roles = {eod, processor.bos_id(), processor.eos_id(), processor.unk_id(), *special}
    roles.add(processor.pad_id())
    tokenizer_hash = hash_file(model)
    if beyond or eod != processor.eos_id():
        tokenizer_hash = hash_json({"model": tokenizer_hash, "eod": eod, "added": beyond})
    return TokenizerRecord(
        algorithm=_algorithm(processor),
        vocab_size=max([pieces - 1, *beyond.values()]) + 1,
        eod=eod,
        tags={_tag_name(text): i for text, i in (control | beyond).items() if i not in roles},
        reserved_tags=[],
        tokenizer_hash=tokenizer_hash,
        languages={},
    )


def _tag_name(text: str) -> str:
    return text.removeprefix("<").removesuffix(">")


def _algorithm(processor: SentencePieceProcessor) -> str:
    # Imported here because Megaphase's own tokenizers do not need it.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    model = ModelProto.FromString(processor.serialized_model_proto())
    spec = model.trainer_spec
    return str(spec.ModelType.Name(spec.model_type)).lower()


def _load_model(path: Path) -> SentencePieceProcessor:
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        problem = "is not a sentencepiece model"
        raise InputError(path, problem, "give one, or a directory that contains one") from None
    if _spells_spaces(processor):
        problem = "has no piece for the space, so a space would be decoded as U+2581"
        raise InputError(path, problem, _REMEDY)
    return processor


def _spells_spaces(processor: SentencePieceProcessor) -> bool:
    """Return whether byte fallback spells a space as the three bytes of U+2581, so that the ids of
    a space and of that character are the same."""
    space = processor.piece_to_id(SPACE_SYMBOL)
    is_piece = processor.id_to_piece(space) == SPACE_SYMBOL and not processor.is_unused(space)
    return not is_piece and processor.is_byte(processor.piece_to_id("<0x20>"))


def _id_of(
    text: str | None, added: dict[str, int], processor: SentencePieceProcessor
) -> int | None:
    """Return the id of a token given its text, or None if neither the model nor `added` has it."""
    if text is None or text in added:
        return None if text is None else added[text]
    token = processor.piece_to_id(text)
    return token if processor.id_to_piece(token) == text else None


def _text_of(token: Any) -> str | None:
    """Return the text of a token, which these files store as a string or an object."""
    return token.get("content") if isinstance(token, dict) else token


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; return an empty one if the file does not exist."""
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(path, "is not a JSON object", "copy the tokenizer again")
    return value
