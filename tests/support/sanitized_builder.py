"""A pytest plugin for `make test-sanitize`: tests use the builder that MEGAPHASE_BUILDER names.

It replaces the installed extension before anything imports it.
"""

import importlib.util
import os
import sys

NAME = "megaphase.plan._builder"

_spec = importlib.util.spec_from_file_location(
    NAME, os.path.abspath(os.environ["MEGAPHASE_BUILDER"])
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules[NAME] = _module

import megaphase.plan  # noqa: E402

megaphase.plan._builder = _module  # type: ignore[attr-defined]
