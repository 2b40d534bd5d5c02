"""Builds the plan's C++ extension; everything declarative stands in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HEADERS = sorted(glob("csrc/*.hpp"))

builder = Pybind11Extension(
    "megaphase.plan._builder",
    ["csrc/module.cpp"],
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
)

setup(ext_modules=[builder], cmdclass={"build_ext": build_ext})
