"""Builds the plan's C++ extension; everything declarative stands in pyproject.toml."""

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

HEADERS = ["csrc/keyed_permutation.hpp", "csrc/blend.hpp", "csrc/sample_index.hpp"]

builder = Pybind11Extension(
    "megaphase.plan._builder",
    ["csrc/module.cpp"],
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"],
)

setup(ext_modules=[builder], cmdclass={"build_ext": build_ext})
