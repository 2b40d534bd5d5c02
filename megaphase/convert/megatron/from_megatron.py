"""Convert a Megatron-LM checkpoint (--ckpt-format torch or torch_dist) to one from which a run can
start."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from torch import Tensor

from megaphase.checkpoint.parameters import WEIGHT
from megaphase.convert.megatron.distributed import DistributedModel, is_distributed
from megaphase.convert.megatron.files import OTHER_CHECKPOINT, iteration_folder
from megaphase.convert.megatron.given_arguments import shape_of, stored_vocab
from megaphase.convert.megatron.names import (
    WORD_EMBEDDINGS,
    Implementation,
    megatron_parameters,
)
from megaphase.convert.megatron.ranks import TensorRanks
from megaphase.convert.megatron.saved import SavedModel
from megaphase.convert.output import new_folder
from megaphase.convert.qkv_order import deinterleaved
from megaphase.convert.weight_import import write_foreign, write_model_section
from megaphase.convert.weights import fp32_bytes
from megaphase.model.parameters import parameter_layouts
from megaphase.utils.errors import InputError
from megaphase.utils.files import real_path


def from_megatron(
    source: Path,
    out: Path,
    *,
    vocab: int | None = None,
    trust_pickle: bool = False,
    workers: int = 1,
    console: Console | None = None,
) -> str:
    """Write the weights of a Megatron-LM checkpoint into the folder `out`, with model.yaml.

    Args:
        source: the folder of --save, or a folder iter_… or release in it.
        vocab: the tokenizer's size, if it is not in the checkpoint.
        trust_pickle: see `load_pickle`.

    Returns the run file's section for the model, YAML.

    Raises:
        InputError: names what is missing, damaged, unknown, or not supported.
    """
    saved = open_saved(source, trust_pickle=trust_pickle)
    weights = MegatronWeights(saved, vocab)
    origin = {
        "format": "Megatron-LM",
        "path": str(real_path(source)),
        "iteration": saved.iteration,
    }
    with new_folder(out, fp32_bytes(weights.shape)) as folder:
        saved.verify(console)
        write_foreign(folder, weights, weights.shape, origin, workers=workers, console=console)
        return write_model_section(folder, weights.shape)


def open_saved(source: Path, *, trust_pickle: bool) -> SavedModel:
    """Open a Megatron-LM checkpoint of either format.

    Raises:
        InputError: a file is missing or damaged, or the checkpoint has another format.
    """
    folder = iteration_folder(source)
    if is_distributed(folder):
        return DistributedModel(folder, trust_pickle=trust_pickle)
    return TensorRanks(folder, trust_pickle=trust_pickle)


class MegatronWeights:
    """The weights of a Megatron-LM checkpoint, in Megaphase's order.

    Attributes:
        shape: of the model.
        layouts, kinds: see `Weights`.
    """

    kinds = (WEIGHT,)

    def __init__(self, saved: SavedModel, vocab: int | None) -> None:
        """
        Args:
            saved: the checkpoint.
            vocab: the tokenizer's size, if it is not in the arguments.

        Raises:
            InputError: the model is not supported, or the tensors are not those of its arguments.
        """
        self._saved = saved
        if WORD_EMBEDDINGS not in saved.kinds:
            raise InputError(saved.path, f"has no tensor {WORD_EMBEDDINGS}", OTHER_CHECKPOINT)
        padded = saved.kinds[WORD_EMBEDDINGS].shape[0] * saved.tensor
        vocab = stored_vocab(saved.args, padded, saved.path) if vocab is None else vocab
        if not 0 < vocab <= padded:
            raise InputError(
                f"--vocab {vocab}",
                f"the embedding in {saved.path} has {padded} rows",
                "give the tokenizer's size",
            )
        self.shape = shape_of(saved.args, vocab, saved.path)
        self.layouts = parameter_layouts(self.shape, 1)
        self._parameters = megatron_parameters(
            self.shape, saved.tensor, padded, _implementation(saved.kinds)
        )
        saved.check(self._parameters.values())

    def whole(self, name: str, kind: str) -> Tensor:
        """Return a parameter, fp32, contiguous, in its layout's shape."""
        parameter = self._parameters[name]
        joined = self._saved.read(parameter)
        return deinterleaved(joined, self.shape) if parameter.interleaved else joined.contiguous()


def _implementation(names: Iterable[str]) -> Implementation:
    fused = any(name.endswith(".linear_qkv.layer_norm_weight") for name in names)
    return Implementation.TRANSFORMER_ENGINE if fused else Implementation.LOCAL
