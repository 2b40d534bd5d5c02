"""A model that does not fit into memory is rejected at once; estimating a deep one is fast."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from plan_support import write_run

from megaphase.config.run import RunConfig
from megaphase.estimate import available_memory, memory
from megaphase.estimate.available_memory import available_bytes, check_memory, lasting_bytes
from megaphase.estimate.setup import Setup, setup_of
from megaphase.estimate.suggestions import GB
from megaphase.model.parameters import parameter_count
from megaphase.model.presets import build_shape
from megaphase.model.shape import GPTShape
from megaphase.utils import cgroups
from megaphase.utils.errors import InputError

SHAPE = GPTShape(vocab=500, seq_len=8, layers=2, hidden=32, heads=4, kv_heads=4, ffn=64)


def config_of(folder: Path, **changes) -> RunConfig:
    model = {"layers": 1, "hidden": 200_000, "heads": 2000, "ffn": 500_000, "seq_len": 8}
    settings = {"model": model, "precision": "fp32", "parallel": {"zero": 0}} | changes
    return write_run(folder, ["en"], **settings)


def test_a_model_that_memory_does_not_hold(tmp_path):
    config = config_of(tmp_path)
    # Attention 4 h², feed-forward 3 h f, embedding and output v h, three norms; weights and two
    # moments in fp32.
    parameters = 4 * 200_000**2 + 3 * 200_000 * 500_000 + 2 * 500 * 200_000 + 3 * 200_000
    needed = 3 * 4 * parameters / GB
    with pytest.raises(InputError) as error:
        check_memory(config, build_shape(config, 500))
    said = str(error.value)
    assert said.startswith(f"{tmp_path}/run.yaml: model: weights and optimizer state need ")
    assert f"need {needed:,.1f} GB of this machine, which has " in said
    assert "model.layers" in said
    assert "zero 3" in said


def test_what_is_refused_is_what_does_not_fit(tmp_path, monkeypatch):
    config = config_of(tmp_path, model={"preset": "gpt-3m", "seq_len": 8})
    shape = build_shape(config, 500)
    _, needed = lasting_bytes(setup_of(config, shape, 1, "cpu"))
    assert needed == 3 * 4 * parameter_count(shape)
    monkeypatch.setattr(available_memory, "available_bytes", lambda: needed)
    check_memory(config, shape)
    monkeypatch.setattr(available_memory, "available_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match=r"need 0.0 GB of this machine"):
        check_memory(config, shape)
    monkeypatch.setattr(available_memory, "available_bytes", lambda: None)  # not known
    check_memory(config, shape)


def test_all_processes_of_a_machine_count(tmp_path, monkeypatch):
    config = config_of(tmp_path, model={"preset": "gpt-3m", "seq_len": 8})
    shape = build_shape(config, 500)
    needed = 3 * 4 * parameter_count(shape)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(available_memory, "available_bytes", lambda: 2 * needed - 1)
    with pytest.raises(InputError, match="of this machine, for 2 processes, which has"):
        check_memory(config, shape)


def test_what_lies_on_the_gpu_and_what_in_the_nodes_memory():
    setup = Setup(SHAPE, tensor=1, data=2, zero=3, sequence=False, bf16=True, micro=1,
                  accumulation=1)  # fmt: skip
    parts = -(-parameter_count(SHAPE) // 2)  # of each rank, without padding
    gpu, host = lasting_bytes(setup)
    assert host == 0
    assert gpu == pytest.approx(parts * (2 + 4 + 8 + 4), rel=1e-3)  # weight, master, moments, grad
    gpu, host = lasting_bytes(replace(setup, offload="cpu"))
    assert gpu == pytest.approx(parts * 2, rel=1e-3)
    assert host == pytest.approx(parts * 16, rel=1e-3)
    assert lasting_bytes(replace(setup, offload="nvme", offload_parameters="nvme")) == (0, 0)


def test_a_model_that_a_gpu_does_not_hold(tmp_path, monkeypatch):
    config = config_of(tmp_path, model={"preset": "gpt-3m", "seq_len": 8})
    monkeypatch.setattr(available_memory, "device", lambda: SimpleNamespace(type="cuda"))
    card = SimpleNamespace(total_memory=1 << 20)
    monkeypatch.setattr(available_memory.torch.cuda, "get_device_properties", lambda _: card)
    with pytest.raises(InputError, match=r"of this GPU, which has 0.0 GB; .*parallel.offload: cpu"):
        check_memory(config, build_shape(config, 500))


def read_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available_memory, "_MEMINFO", folder / "meminfo")
    monkeypatch.setattr(cgroups, "_OWN_CGROUPS", folder / "self")
    monkeypatch.setattr(cgroups, "_MOUNT", folder / "cgroup")


def test_a_limit_of_a_cgroup_counts(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable:   9000 kB\n")
    (tmp_path / "self").write_text("0::/a/b\n")
    for folder, limit, used in ((".", "max", 7), ("a", "5000000", 4_000_000), ("a/b", "max", 3)):
        place = tmp_path / "cgroup" / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text("anon 1\ninactive_file 500000\nactive_file 70000\n")
    read_below(tmp_path, monkeypatch)
    assert available_bytes() == 1_570_000
    (tmp_path / "cgroup/a/memory.max").write_text("max\n")
    assert available_bytes() == 9_000 * 1024
    (tmp_path / "meminfo").unlink()
    assert available_bytes() is None


@pytest.mark.parametrize("version_2", ["", "0::/user.slice\n"], ids=["pure", "hybrid"])
@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_a_limit_of_a_cgroup_of_version_1_counts(version_2, controllers, tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 200 kB\nMemAvailable: 100000000 kB\n")
    job = "slurm/uid_1/job_7"
    (tmp_path / "self").write_text(f"9:{controllers}:/{job}/step_0\n3:cpuset:/x\n{version_2}")
    unlimited = 2**63 - 4096
    for folder, limit in (
        (".", unlimited),
        ("slurm", unlimited),
        (job, 4_000_000_000),
        (f"{job}/step_0", unlimited),
    ):
        place = tmp_path / "cgroup/memory" / folder
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (place / "memory.usage_in_bytes").write_text("3500000000\n")
        (place / "memory.stat").write_text(
            "inactive_file 1\nactive_file 2\n"  # of the cgroup without those within it
            "total_inactive_file 300000000\ntotal_active_file 2000000000\n"
        )
    read_below(tmp_path, monkeypatch)
    assert available_bytes() == 2_800_000_000
    limit_of_job = tmp_path / "cgroup/memory" / job / "memory.limit_in_bytes"
    limit_of_job.write_text("1000000000\n")  # lowered below what is in use
    assert available_bytes() == 0
    limit_of_job.unlink()
    assert available_bytes() == 100_000_000 * 1024
    (tmp_path / "meminfo").unlink()
    assert available_bytes() is None  # no limit is no amount of memory


def random_setup(rng: random.Random) -> Setup:
    hidden, zero = rng.choice([32, 256, 4096]), rng.randrange(4)
    shape = replace(
        SHAPE,
        vocab=rng.choice([500, 256_000]),
        seq_len=rng.choice([64, 2048]),
        layers=rng.choice([1, 2, 3, 7, 24, 61]),
        hidden=hidden,
        ffn=4 * hidden,
        tied_embeddings=rng.random() < 0.5,
        activation_checkpointing=rng.choice(["none", "selective", "full"]),
    )
    offload = rng.choice(["none", "cpu"]) if zero else "none"
    return Setup(
        shape,
        tensor=rng.choice([1, 2]),
        data=rng.choice([1, 2, 64]),
        zero=zero,
        sequence=False,
        bf16=rng.random() < 0.5,
        micro=rng.choice([1, 8]),
        accumulation=rng.choice([1, 4]),
        offload=offload,
        keep_gathered=rng.choice([0.0, 0.3, 1.0]) if zero == 3 else 0.0,
        device=rng.choice(["cpu", "cuda"]),
    )


@pytest.mark.slow
def test_the_blocks_that_are_looked_at_are_those_that_matter(monkeypatch):
    rng = random.Random(7)
    setups = [random_setup(rng) for _ in range(300)]
    found = [memory.estimate(setup) for setup in setups]
    memory.estimate.cache_clear()
    every = lambda layers, *_: list(range(layers, 0, -1))  # noqa: E731
    monkeypatch.setattr(memory, "_turning_points", every)
    assert found == [memory.estimate(setup) for setup in setups]
    memory.estimate.cache_clear()
