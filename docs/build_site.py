"""Build the documentation site: python docs/build_site.py [FOLDER], by default build/site.

The pages link to each other as the files of the repository do. So the site is made of a copy of its
text files, in which those links hold as they are, also between docs/ and examples/.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "build" / "site-source"  # `docs_dir` of mkdocs.yml
FOLDERS = ("docs", "examples", "launch", "containers", "benchmarks")
SUFFIXES = {".md", ".css", ".png", ".csv", ".yaml", ".json", ".sh", ".sbatch", ".py", ".def"}


def copy_pages() -> None:
    """Copy what the pages consist of, and link to, into SOURCE."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    pages = [
        path for path in REPOSITORY.iterdir() if path.suffix == ".md" or path.name == "LICENSE"
    ]
    for folder in FOLDERS:
        pages += [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in SUFFIXES]
    for path in pages:
        copy = SOURCE / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def build(site: Path) -> int:
    """Build the site into a folder; return mkdocs' exit code, 1 at a broken link or a warning."""
    copy_pages()
    command = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=REPOSITORY, env=environment)
    return done.returncode


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve() if sys.argv[1:] else REPOSITORY / "build" / "site"))
