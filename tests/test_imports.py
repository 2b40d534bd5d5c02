"""The structure: imports between the rooms of the package point one way, and form no circles."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = {"megaphase": "megaphase", "data_tools": "megaphase.data_tools",
           "launch": "megaphase.launch"}  # fmt: skip

# A room imports rooms that are listed before it, and no others.
ORDER = (
    "utils",
    "config",
    "corpus",
    "tokenizer",
    "chats",
    "ops",
    "distributed",
    "fault_tolerance",
    "checkpoint",
    "model",
    "decoding",
    "optim",
    "estimate",
    "plan",
    "callbacks",
    "harness",
    "training",
    "convert",
    "generation",
    "evaluation",
    "report",
    "data_tools",
    "launch",
    "rehearsal",
    "sweep",
    "init",
    "doctor",
    "cli",
    "__main__",
)

# The run file is composed of its components' config classes, so these import from above.
COMPOSITION = ("megaphase.config.run", "megaphase.config.phases", "megaphase.config.load")
# What they import may in turn import only this and modules of its own room.
BELOW_CONFIG_CLASSES = ("megaphase.utils", "megaphase.config.fields")

# Commands import within functions what they need, so that the others start without it: torch,
# DeepSpeed, matplotlib and whatever imports those.
COMMANDS = ("commands", "cli", "__main__")
# Elsewhere a function may import a module of the package that imports something slow, which
# most callers of the importing module do without.
SLOW = {
    # torch
    ("megaphase.distributed.all_ranks", "megaphase.distributed.process_grid"),
    # torch, which must find the fake device when it is imported
    ("megaphase.rehearsal.process", "megaphase.config.run"),
    ("megaphase.rehearsal.process", "megaphase.rehearsal.rank"),
    # torch, DeepSpeed, Triton and the extensions, which a check finds broken
    ("megaphase.doctor.checks.kernels", "megaphase.doctor.triton_kernel"),
    ("megaphase.doctor.checks.kernels", "megaphase.training.deepspeed_import"),
    ("megaphase.doctor.checks.kernels", "megaphase.training.nvme"),
    ("megaphase.doctor.checks.software", "megaphase.corpus"),
    ("megaphase.doctor.checks.software", "megaphase.fault_tolerance"),
    ("megaphase.doctor.checks.software", "megaphase.plan"),
    # torch, for a report without a law does without
    ("megaphase.sweep.law.model_size", "megaphase.model.parameters"),
    ("megaphase.sweep.law.model_size", "megaphase.model.presets"),
    # pyarrow, which is an extra, too
    ("megaphase.data_tools.text.chunks", "megaphase.data_tools.text.parquet"),
    ("megaphase.data_tools.text.chunks", "megaphase.data_tools.text.arrow"),
    ("megaphase.data_tools.text.records", "megaphase.data_tools.text.rows"),
    # lm_eval, which is an extra
    ("megaphase.harness.benchmarks", "megaphase.harness.language_model"),
    # zstandard, numpy and others: these options are declared beside commands
    ("megaphase.data_tools.options", "megaphase.data_tools.text"),
    ("megaphase.data_tools.options", "megaphase.data_tools.text.reading"),
}  # fmt: skip


class Import(NamedTuple):
    module: str
    imported: str
    in_function: bool


def module_names():
    names = {}
    for folder, package in SOURCES.items():
        for path in (REPOSITORY / folder).rglob("*.py"):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            names[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return names


MODULES = module_names()


def imports_below(node, module, in_function=False):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: a relative import"
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                name = name if name in MODULES else child.module
                yield Import(module, name, in_function)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(module, alias.name, in_function)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports_below(child, module, in_function or is_function)


def all_imports():
    return [
        found
        for module, path in MODULES.items()
        for found in imports_below(ast.parse(path.read_text()), module)
        if found.imported in MODULES
    ]


IMPORTS = all_imports()


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_the_order_names_every_room():
    assert {room(module) for module in MODULES} - {""} == set(ORDER)


def test_imports_between_rooms_point_one_way():
    wrong = set()
    for module, imported, _ in IMPORTS:
        here, there = room(module), room(imported)
        if here == there or not here or not there or module in COMPOSITION:
            continue
        if ORDER.index(there) >= ORDER.index(here):
            wrong.add((module, there))
    assert wrong == set()


def test_config_classes_need_nothing_but_fields_and_their_own_room():
    composed = {i.imported for i in IMPORTS if i.module in COMPOSITION}
    reached, waiting = set(), {m for m in composed if room(m) not in ("config", "utils")}
    while waiting:
        module = waiting.pop()
        reached.add(module)
        for found in IMPORTS:
            if found.module != module:
                continue
            assert found.imported.startswith(BELOW_CONFIG_CLASSES) or room(found.imported) == room(
                module
            ), found
            if room(found.imported) == room(module) and found.imported not in reached:
                waiting.add(found.imported)
    assert reached


def test_there_is_no_circle_of_modules():
    graph = {module: set() for module in MODULES}
    for module, imported, _ in IMPORTS:
        if imported != module:
            graph[module].add(imported)
    assert len(list(TopologicalSorter(graph).static_order())) == len(MODULES)


def test_functions_import_nothing_of_the_package_but_what_is_slow():
    found = {
        (i.module, i.imported)
        for i in IMPORTS
        if i.in_function and i.module.rpartition(".")[2] not in COMMANDS
    }
    assert found - SLOW == set()
    assert SLOW - found == set(), "take these from the list"


@pytest.mark.parametrize(
    "module", ["megaphase.cli", "megaphase.config.load", "megaphase.sweep.file",
               "megaphase.launch.slurm.pipeline"],
)  # fmt: skip
def test_a_file_is_read_without_torch(module):
    program = (
        f"import sys, {module}; print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
