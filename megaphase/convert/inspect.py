"""Inspect a checkpoint of any supported program."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from megaphase.checkpoint.state import ADAMW, AVERAGE, NEW_TOKENS, OPTIMIZER, STATE_FILE
from megaphase.checkpoint.tensor_file import TensorFile, TensorKind
from megaphase.convert.checkpoint_writer import PORTABLE_FOLDER
from megaphase.convert.hugging_face.config_file import CONFIG_FILE, ConfigFile
from megaphase.convert.hugging_face.weights import find_tensors
from megaphase.convert.megatron.distributed import is_distributed
from megaphase.convert.megatron.from_megatron import open_saved
from megaphase.convert.megatron.names import TRACKER_FILE
from megaphase.convert.safe_torch_load import check_archives
from megaphase.convert.source import Source, open_source, verify_checkpoint
from megaphase.utils.errors import InputError
from megaphase.utils.files import folder_bytes, read_file
from megaphase.utils.names import LATEST
from megaphase.utils.progress import bytes_progress
from megaphase.utils.remote_files import is_url
from megaphase.utils.run_files import CHECKPOINTS

_MEGATRON_FOLDER = re.compile(r"mp_rank_\d+(_\d+)*")
_DEEPSPEED_FILE = re.compile(r"(?:bf16_)?(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_\w+_states\.pt")
_DEEPSPEED_STAGE_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")


@dataclass(frozen=True)
class Contents:
    """The result of an inspection.

    Attributes:
        format: the program that wrote it.
        facts: the checkpoint's own information, with readable names.
        tensors: dtype and shape of every parameter, whole if known.
        nbytes: size of its files on disk.
        verified: what was verified, in words; None if nothing was.
    """

    format: str
    facts: Mapping[str, Any]
    tensors: Mapping[str, TensorKind]
    nbytes: int
    verified: str | None

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(kind.numel for kind in self.tensors.values())


@dataclass(frozen=True)
class Inspector:
    """The options of an inspection: see `inspect`."""

    verify: bool
    trust_pickle: bool
    workers: int
    console: Console | None


def inspect(text: str, how: Inspector) -> Contents:
    """Recognize a checkpoint's format and read everything except its values.

    Hashes and checksums are verified if there are any and `how.verify` is set.

    Raises:
        InputError: the format is not known, or a file is damaged.
    """
    path = Path(text)
    if (path / CHECKPOINTS).is_dir():
        return _megaphase(open_source(f"{text}@{LATEST}"), how)
    if is_url(text) or ("@" in text and not path.exists()) or (path / STATE_FILE).is_file():
        return _megaphase(open_source(text), how)
    if (path / CONFIG_FILE).is_file():
        return _hugging_face(path, how)
    if path.is_file() and path.suffix == ".safetensors":
        return _safetensors(path)
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        if (
            TRACKER_FILE in names
            or any(map(_MEGATRON_FOLDER.fullmatch, names))
            or is_distributed(path)
        ):
            return _megatron(path, how)
        folder = _deepspeed_folder(path)
        if folder is not None:
            return _deepspeed(folder)
    raise InputError(
        text,
        "is no checkpoint of megaphase, Hugging Face, Megatron-LM or DeepSpeed",
        "give a checkpoint's folder, or RUN@NAME",
    )


def _megaphase(source: Source, how: Inspector) -> Contents:
    state, weights = source.state, source.weights
    verified = None
    if how.verify:
        with bytes_progress(how.console, "verifying", source.nbytes) as advance:
            files = verify_checkpoint(source.folder, workers=how.workers, advance=advance)
        verified = f"all {files} files are as they were written"
    portable = all(file.startswith(f"{PORTABLE_FOLDER}/") for file in weights.shards)
    position = state.get("position", {})
    facts = {
        "folder": str(source.folder),
        "layout": "portable, a file a parameter" if portable else _layout(state),
        "phase": state.get("phase_name"),
        "step": state.get("step"),
        "tokens": position.get("tokens"),
        "optimizer": state.get(OPTIMIZER, ADAMW) if state.get("optimizer_steps") else None,
        "optimizer steps": state.get("optimizer_steps"),
        "kinds": ", ".join(weights.kinds),
        "precision": state.get("precision"),
        "model": source.shape.architecture(),
        "samples used": state.get("used") or None,
        "new tokens": state.get(NEW_TOKENS),
        "average": state.get(AVERAGE),
        "average of": state.get("averaged"),
        "origin": state.get("origin") or None,
    }
    tensors = {name: TensorKind(torch.float32, lay.shape) for name, lay in weights.layouts.items()}
    return Contents("megaphase", _known(facts), tensors, source.nbytes, verified)


def _layout(state: Mapping[str, Any]) -> str:
    tensor, processes = state.get("tensor"), state.get("processes")
    if not tensor or not processes:
        return "not known"
    return f"tensor {tensor} × data {processes // tensor}, ZeRO {state.get('zero')}"


def _hugging_face(directory: Path, how: Inspector) -> Contents:
    with ExitStack() as open_files:
        found = find_tensors(directory, open_files, trust_pickle=how.trust_pickle)
        tensors = {each.name: each.kind for each in found}
        files = sorted({each.path for each in found})
    config = ConfigFile(directory / CONFIG_FILE).values
    names = config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    checked = _check_pickles([path for path in files if path.suffix == ".bin"], how)
    facts = {
        "folder": str(directory),
        "architecture": ", ".join(names) or None,
        "layout": f"{len(files)} file{'s' if len(files) > 1 else ''}",
        "model": {k: v for k, v in config.items() if isinstance(v, int | float | str | bool)},
    }
    return Contents("Hugging Face", _known(facts), tensors, folder_bytes(directory), checked)


def _megatron(source: Path, how: Inspector) -> Contents:
    saved = open_saved(source, trust_pickle=how.trust_pickle)
    checked = None
    if how.verify:
        files = saved.verify(how.console)
        checked = f"the checksums in {files} files of tensors are right"
    args = vars(saved.args)
    facts = {
        "folder": str(saved.folder),
        "layout": saved.layout,
        "step": saved.iteration,
        "samples used": args.get("consumed_train_samples"),
        "model": {k: v for k, v in args.items() if isinstance(v, int | float | str | bool)},
    }
    size = folder_bytes(saved.folder)
    return Contents("Megatron-LM", _known(facts), saved.kinds, size, checked)


def _safetensors(path: Path) -> Contents:
    with TensorFile(path) as file:
        facts = {"folder": str(path.parent), "metadata": file.metadata or None}
        return Contents("safetensors", _known(facts), file.kinds, path.stat().st_size, None)


def _deepspeed_folder(path: Path) -> Path | None:
    """Return the folder of the ranks' files: this one, or the one named in `latest`."""
    folder = path
    if (path / "latest").is_file():
        folder = path / read_file(path / "latest").decode(errors="replace").strip()
    if folder.is_dir() and any(_DEEPSPEED_FILE.fullmatch(each.name) for each in folder.iterdir()):
        return folder
    return None


def _deepspeed(folder: Path) -> Contents:
    names = [each.name for each in folder.iterdir()]
    found = [match for match in map(_DEEPSPEED_FILE.fullmatch, names) if match]
    data = len({match[1] for match in found if match[1] is not None}) or 1
    tensor = len({match[2] for match in found})
    stage_3 = any(map(_DEEPSPEED_STAGE_3.fullmatch, names))
    partitioned = any(match[1] is not None for match in found)
    stage = "ZeRO 3" if stage_3 else "ZeRO 1 or 2" if partitioned else "ZeRO 0"
    facts = {
        "folder": str(folder),
        "layout": f"tensor {tensor} × data {data}, {stage}",
        "note": "its tensors can be had with DeepSpeed's zero_to_fp32.py",
    }
    return Contents("DeepSpeed", facts, {}, folder_bytes(folder), None)


def _check_pickles(files: list[Path], how: Inspector) -> str | None:
    if not how.verify or not files:
        return None
    check_archives(files, how.console)
    return f"the checksums in {len(files)} files of tensors are right"


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}
