"""Builds the plan's C++ extension; everything declarative stands in pyproject.toml."""

import os
from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

OPTIONS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
SANITIZE = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]

sanitize = bool(os.environ.get("MEGAPHASE_SANITIZE"))

builder = Pybind11Extension(
    "megaphase.plan._builder",
    ["csrc/module.cpp"],
    depends=sorted(glob("csrc/*.hpp")),
    cxx_std=17,
    extra_compile_args=OPTIONS + (SANITIZE if sanitize else []),
    extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
)

setup(ext_modules=[builder], cmdclass={"build_ext": build_ext})
