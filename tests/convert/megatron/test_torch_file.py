"""Files written tensor by tensor can be read by torch.load, and any unzip."""

from __future__ import annotations

import zipfile
from argparse import Namespace

import pytest
import torch

from megaphase.checkpoint.tensor_file import TensorKind
from megaphase.convert.megatron.torch_file import TorchFileWriter
from megaphase.convert.safe_torch_load import check_archive, load_pickle

TENSORS = {
    "matrix": torch.randn(300, 17),
    "vector": torch.randn(5).bfloat16(),
    "one": torch.randn(1, 1, 1).half(),
    "long": torch.randn(100_000),
}


def write(path):
    kinds = {name: TensorKind(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    content = {"args": Namespace(dtype=torch.bfloat16), "iteration": 3, "model": kinds}
    return TorchFileWriter(path, content)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_loads_it(tmp_path, parts, weights_only, mmap) -> None:
    path = tmp_path / "model.pt"
    writer = write(path)
    for tensor in TENSORS.values():
        for part in tensor.flatten().chunk(parts):
            writer.write(part)
    writer.close()
    with torch.serialization.safe_globals([Namespace]):
        found = torch.load(path, weights_only=weights_only, mmap=mmap)
    assert found["args"] == Namespace(dtype=torch.bfloat16)
    assert found["iteration"] == 3
    assert found["model"].keys() == TENSORS.keys()
    for name, tensor in found["model"].items():
        assert tensor.dtype == TENSORS[name].dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, TENSORS[name])
        assert not mmap or tensor.data_ptr() % 64 == 0


def test_checksums_are_those_of_a_zip_archive(tmp_path) -> None:
    path = tmp_path / "model.pt"
    writer = write(path)
    for tensor in TENSORS.values():
        writer.write(tensor)
    writer.close()
    check_archive(path)
    assert zipfile.ZipFile(path).testzip() is None


def test_an_abandoned_file_is_not_taken_for_whole(tmp_path) -> None:
    path = tmp_path / "model.pt"
    writer = write(path)
    writer.write(TENSORS["matrix"][:3])
    writer.abandon()
    with pytest.raises(Exception, match="model"):
        load_pickle(path, trust=False)
