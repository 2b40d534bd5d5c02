"""The documentation is correct: every key and default, every command, every link."""

import importlib.util
import re
import subprocess
import sys
import typing
from collections import Counter
from pathlib import Path

import pytest
from pydantic import BaseModel

from megaphase import cli
from megaphase.config.load import load_run_file
from megaphase.config.run import RunConfig
from megaphase.estimate.gpu_specs import CARDS
from megaphase.model.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[1]
RUN_FILE = (REPOSITORY / "docs" / "run-file.md").read_text()
README = (REPOSITORY / "README.md").read_text()


def generator():
    path = REPOSITORY / "docs" / "generate_run_file.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_run_file_is_made_from_the_config_classes():
    assert generator().page() == RUN_FILE, "run `make docs`"


def section_classes(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from section_classes(field.annotation)
    for each in typing.get_args(annotation):
        yield from section_classes(each)


def test_the_page_has_every_key_of_every_section():
    expected = Counter(
        field.alias or name
        for model in section_classes(RunConfig)
        for name, field in model.model_fields.items()
    )
    assert Counter(re.findall(r"^\| `(\w+)` \|", RUN_FILE, re.MULTILINE)) == expected


def test_links_within_the_page_of_the_run_file_lead_to_its_headings():
    headings = re.findall(r"^## (.*)$", RUN_FILE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
    targets = set(re.findall(r"\]\(#(.*?)\)", RUN_FILE))
    assert targets
    assert targets == anchors - {"top-level"}


def test_the_presets_are_listed():
    for name in PRESETS:
        assert f"`{name}`" in RUN_FILE


def test_the_cards_are_listed():
    for name in CARDS:
        assert f"`{name}`" in RUN_FILE


def test_the_readme_names_every_command():
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"megaphase {name}" in README
    for group in cli.app.registered_groups:
        assert f"megaphase {group.name} " in README


def test_the_run_files_of_the_readme_are_valid(tmp_path):
    tiny, run_file, further_phases = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[:3]
    in_place_of_joint = re.sub(
        r"  - name: joint.*?(?=validation:)", further_phases, run_file, flags=re.DOTALL
    )
    for text, names in (
        (tiny, ["pretrain", "joint"]),
        (run_file, ["pretrain", "joint"]),
        (in_place_of_joint, ["pretrain", "joint", "long"]),
    ):
        (tmp_path / "run.yaml").write_text(text)
        assert [phase.name for phase in load_run_file(tmp_path / "run.yaml").phases] == names


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, REPOSITORY / "docs" / "build_site.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "docs" / "plan" / "index.html").is_file()
    assert "CorpusWriter" in (tmp_path / "docs" / "api" / "index.html").read_text()


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/run-file.md",
        "docs/plan.md",
        "docs/sweeps.md",
        "docs/experiments.md",
        "docs/sweep-results.md",
        "docs/law-results.md",
        "docs/planned-comparisons.md",
        "examples/paper/README.md",
        "docs/checkpoints.md",
        "docs/conversion.md",
        "docs/continued-pretraining.md",
        "examples/add-languages/README.md",
        "docs/generation.md",
        "docs/profiling.md",
        "docs/reliability.md",
        "docs/slurm.md",
        "docs/performance.md",
        "docs/scaling.md",
        "docs/doctor.md",
        "docs/init.md",
    ],
)
def test_links_between_pages_lead_somewhere(page):
    folder = (REPOSITORY / page).parent
    for target in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / page).read_text()):
        assert target.startswith("http") or (folder / target).exists(), target
