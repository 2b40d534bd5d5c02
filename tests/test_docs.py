"""The documentation says what is true: every key and default, every command, every link."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined

from megaphase import cli
from megaphase.callbacks.config import LoggingConfig
from megaphase.callbacks.early_stopping import MonitorConfig, OverfitConfig, StopConfig
from megaphase.checkpoint.config import CheckpointConfig
from megaphase.config.fields import Section
from megaphase.config.load import load_run_file
from megaphase.config.phases import PhaseConfig
from megaphase.config.run import RunConfig
from megaphase.distributed.config import ParallelConfig
from megaphase.estimate.hardware import HardwareConfig
from megaphase.fault_tolerance.config import FaultsConfig
from megaphase.model.config import ModelConfig
from megaphase.model.presets import PRESETS
from megaphase.optim.config import OptimizerConfig
from megaphase.optim.schedules import LearningRateConfig
from megaphase.plan.config import BatchConfig, TaskConfig
from megaphase.plan.mixture import MixtureConfig
from megaphase.training.config import BackendsConfig, ValidationConfig

REPOSITORY = Path(__file__).resolve().parents[1]
RUN_FILE = (REPOSITORY / "docs" / "run-file.md").read_text()
README = (REPOSITORY / "README.md").read_text()

SECTIONS = {
    "Top level": RunConfig,
    "`tasks.NAME`": TaskConfig,
    "`model`": ModelConfig,
    "`parallel`": ParallelConfig,
    "`batch`": BatchConfig,
    "`optimizer`": OptimizerConfig,
    "`parts`": BackendsConfig,
    "`phases[N]`": PhaseConfig,
    "`phases[N].mixture`": MixtureConfig,
    "`phases[N].learning_rate`": LearningRateConfig,
    "`phases[N].stop`": StopConfig,
    "`phases[N].stop.overfit`": OverfitConfig,
    "`validation`": ValidationConfig,
    "`monitor`": MonitorConfig,
    "`checkpoint`": CheckpointConfig,
    "`faults`": FaultsConfig,
    "`logging`": LoggingConfig,
    "`hardware`": HardwareConfig,
}


def documented(title):
    """Keys of a section's table, each with the text of its default."""
    body = RUN_FILE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\|", body, re.MULTILINE))


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_stands_with_its_default(title):
    found = documented(title)
    model = SECTIONS[title]
    assert list(found) == list(model.model_fields)
    for key, field in model.model_fields.items():
        if field.default is PydanticUndefined:
            assert found[key] == "*required*", key
        elif isinstance(field.default, Section):
            assert found[key] == "", key
        elif field.default is None:
            assert found[key] == "—", key
        else:
            shown = yaml.safe_load(found[key])
            expected = list(field.default) if isinstance(field.default, tuple) else field.default
            assert (float(shown) if isinstance(expected, float) else shown) == expected, key


def test_the_presets_are_listed():
    for name in PRESETS:
        assert f"`{name}`" in RUN_FILE or f"`{name.removeprefix('gpt-')}`" in RUN_FILE


def test_the_readme_names_every_command():
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"megaphase {name}" in README
    for group in cli.app.registered_groups:
        assert f"megaphase {group.name} " in README


def test_the_run_file_of_the_readme_is_valid(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "run.yaml").write_text(text)
    assert [phase.name for phase in load_run_file(tmp_path / "run.yaml").phases] == [
        "pretrain", "joint",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/run-file.md",
        "docs/plan.md",
        "docs/sweeps.md",
        "docs/experiments.md",
        "examples/paper/README.md",
        "docs/checkpoints.md",
        "docs/conversion.md",
        "docs/generation.md",
        "docs/profiling.md",
        "docs/reliability.md",
        "docs/slurm.md",
        "docs/performance.md",
        "docs/scaling.md",
    ],
)
def test_links_between_pages_lead_somewhere(page):
    folder = (REPOSITORY / page).parent
    for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / page).read_text()):
        assert target.startswith("http") or (folder / target).exists(), target
