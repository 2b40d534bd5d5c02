"""How far every family of Hugging Face models deviates from transformers: the tables of
docs/conversion.md.

Runs the tests that compare them, and prints what they recorded: the largest deviation of logits,
relative to the largest logit, at each tensor-parallel size, and token by token from a cache; that
of ten losses from those of plain torch; and what became of every changed key of config.json.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent.parent / "tests/convert/hugging_face"
DEVIATIONS = ("tensor 1", "tensor 2", "tensor 4", "generation", "training", "export")
OUTCOMES = ("the same logits", "refused", "transformers refuses")


def recorded(test_file: str) -> dict[str, dict[str, str]]:
    """Run a file of tests; return what its tests recorded, by their parameter."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        options = ["-m", "slow or not slow", "-o", "junit_family=xunit1", f"--junitxml={results}"]
        command = [sys.executable, "-m", "pytest", str(TESTS / test_file), *options]
        subprocess.run(command, check=True, stdout=sys.stderr)
        for case in ElementTree.parse(results).iter("testcase"):
            parameter = case.attrib["name"].partition("[")[2].removesuffix("]")
            for each in case.iter("property"):
                found[parameter][each.attrib["name"]] = each.attrib["value"]
    return found


def largest(found: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """The largest deviations of the variants of each family, whose names have a comma."""
    rows: dict[str, dict[str, str]] = defaultdict(dict)
    for name, row in found.items():
        family = rows[name.split(",")[0]]
        for column, value in row.items():
            known = family.get(column, value)
            family[column] = value if value.isalpha() else max(known, value, key=float)
    return rows


def shown(value: str | None) -> str:
    """A deviation with one digit; a dash where the heads do not divide."""
    if value is None:
        return "–"
    return value if value.isalpha() or value.isdigit() else f"{float(value):.0e}"


def print_table(title: str, columns: tuple[str, ...], rows: dict[str, dict[str, str]]) -> None:
    print(f"| {title} | {' | '.join(columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(shown(row.get(each)) for each in columns)} |")
    print()


if __name__ == "__main__":
    print_table("model", DEVIATIONS, largest(recorded("test_families.py")))
    print_table("config.json of", OUTCOMES, recorded("test_config_keys.py"))
