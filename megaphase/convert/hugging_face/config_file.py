"""The config.json of a Hugging Face model: its values, each checked, and all of them accounted
for."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

from megaphase.utils.errors import InputError
from megaphase.utils.files import read_json

CONFIG_FILE = "config.json"
_REMEDY = "megaphase has no such model; use another one"
# Bounds of sizes, those of a run file's.
_LAYERS, _MOST_LAYERS, _MOST = {"num_hidden_layers", "n_layer"}, 2_000, 1 << 27
_LONGEST = 100  # characters of a value in a message

_TOKENS = "ids of tokens, which the tokenizer knows"
_DROPOUT = "dropout of training; the run file has its own"
_OUTPUT = "what transformers returns beside the logits"
_NAME = "a name"
_DTYPE = "the type of the stored weights, which the files tell"
_GENERATION = "how transformers generates text"
_TASK = "of models that classify"
# Keys that change no logits, and why.
HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(("architectures", "_name_or_path", "name_or_path", "_commit_hash"), _NAME),
    "transformers_version": "the version that wrote the file",
    **dict.fromkeys(
        (
            "_attn_implementation",
            "_attn_implementation_autoset",
            "attn_implementation",
            "_flash_attn_2_enabled",
        ),
        "which kernel computes attention",
    ),
    **dict.fromkeys(("unsloth_fixed", "unsloth_version"), "of the program that uploaded it"),
    "transformers.js_config": "of another program",
    "custom_pipelines": "of programs that generate text",
    **dict.fromkeys(("torch_dtype", "dtype", "use_bfloat16"), _DTYPE),
    "initializer_range": "of initial weights",
    "attention_dropout": _DROPOUT,
    **dict.fromkeys(
        (
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "sep_token_id",
            "decoder_start_token_id",
            "unk_token_id",
            "tokenizer_class",
            "prefix",
        ),
        _TOKENS,
    ),
    **dict.fromkeys(
        (
            "output_attentions",
            "output_hidden_states",
            "return_dict",
            "return_dict_in_generate",
            "output_scores",
            "output_past",
            "keys_to_ignore_at_inference",
            "torchscript",
        ),
        _OUTPUT,
    ),
    **dict.fromkeys(
        (
            "use_cache",
            "cache_implementation",
            "max_length",
            "min_length",
            "max_new_tokens",
            "do_sample",
            "early_stopping",
            "num_beams",
            "num_beam_groups",
            "num_return_sequences",
            "diversity_penalty",
            "temperature",
            "top_k",
            "top_p",
            "typical_p",
            "repetition_penalty",
            "encoder_no_repeat_ngram_size",
            "exponential_decay_length_penalty",
            "length_penalty",
            "no_repeat_ngram_size",
            "bad_words_ids",
            "suppress_tokens",
            "begin_suppress_tokens",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "remove_invalid_values",
            "task_specific_params",
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        ("id2label", "label2id", "num_labels", "_num_labels", "problem_type", "finetuning_task"),
        _TASK,
    ),
    "gradient_checkpointing": "recomputation in training; the run file has its own",
    "pretraining_tp": "in how many parts transformers computed a product",
    "chunk_size_feed_forward": "in how many parts transformers computes a product",
    "tf_legacy_loss": "of TensorFlow",
    "is_decoder": "whether a model of encoder type is used as a decoder",
}
# Keys of every architecture that must have these values, or be missing.
_FIXED: Mapping[str, Collection[Any]] = {
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "pruned_heads": ({}, None),
}


class ConfigFile:
    """The keys of a config.json; a null value counts as missing, as in transformers.

    Every key that is asked for counts as understood; see `refuse_others`.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: there is no such file, or it is not a JSON object.
        """
        self._path = path
        self._understood: set[str] = set()
        try:
            self._values: Any = read_json(path)
        except OSError as error:
            raise InputError(
                path,
                f"cannot be read ({error.strerror})",
                "give the directory of a Hugging Face model",
            ) from None
        except ValueError:
            self._values = None
        if not isinstance(self._values, dict):
            raise InputError(path, "is not a JSON object", "copy the model again")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A file with these values, before it is written."""
        config = cls.__new__(cls)
        config._path, config._understood, config._values = Path(CONFIG_FILE), set(), dict(values)
        return config

    @property
    def values(self) -> Mapping[str, Any]:
        """All of them, as they are in the file."""
        values: Mapping[str, Any] = self._values
        return values

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is in the file, `default` without the key."""
        self._understood.add(key)
        return self._values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive whole number."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problem = "is missing" if value is None else f"is {value!r}, not a positive number"
            raise self.refusal(key, problem, "copy the model again")
        most = _MOST_LAYERS if key in _LAYERS else _MOST
        if value > most:
            problem = f"is {_short(value)}, more than {most:,}"
            raise self.refusal(key, problem, "copy the model again")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a positive number."""
        value = self.get(key)
        value = default if value is None else value
        if not is_positive(value):
            problem = f"is {_short(value)}, not a positive number"
            raise self.refusal(key, problem, "copy the model again")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refusal(key, f"is {value!r}, not true or false", "copy the model again")
        return value

    def refuse_if(self, key: str, refused: bool) -> None:
        """Reject the value of a key."""
        if refused:
            raise self.refusal(key, f"is {_short(self.get(key))}")

    def refuse_others(self, harmless: Mapping[str, str]) -> None:
        """Reject keys that nothing has asked for, unless they change no logits.

        harmless: those of this architecture, and why.

        Raises:
            InputError: names them.
        """
        for key, allowed in _FIXED.items():
            if key not in self._understood:
                self.refuse_if(key, self.get(key) not in allowed)
        known = self._understood | HARMLESS.keys() | harmless.keys()
        if unknown := [key for key in self._values if key not in known]:
            many = len(unknown) > 1
            raise self.refusal(
                ", ".join(unknown),
                f"{'are not keys' if many else 'is not a key'} that megaphase knows in such models",
                f"remove {'them' if many else 'it'} if the logits do not depend on "
                f"{'them' if many else 'it'}, or use another model",
            )

    def refusal(self, key: str, problem: str, remedy: str = _REMEDY) -> InputError:
        return InputError(f"{self._path}: {key}", problem, remedy)


def is_positive(value: Any) -> bool:
    """Return whether a value is a positive number that a float holds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 < value <= sys.float_info.max


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
