"""Builds the C++ extensions; everything declarative is in pyproject.toml."""

import os
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

OPTIONS = ["-O3", "-fvisibility=hidden", "-Wall", "-Wextra"]
SANITIZE = [
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]

ParallelCompile(default=0).install()  # one compiler a core
sanitize = bool(os.environ.get("MEGAPHASE_SANITIZE"))


def extension(name: str, *sources: str) -> Pybind11Extension:
    return Pybind11Extension(
        name,
        list(sources),
        depends=sorted(glob("csrc/**/*.h*", recursive=True)),
        cxx_std=17,
        extra_compile_args=OPTIONS + (SANITIZE if sanitize else []),
        extra_link_args=["-fsanitize=address,undefined"] if sanitize else [],
    )


setup(
    ext_modules=[
        extension("megaphase.plan._builder", "csrc/module.cpp", "csrc/stream_bindings.cpp"),
        extension("megaphase.corpus._checksums", "csrc/checksums.cpp"),
        extension("megaphase.fault_tolerance._thread_stacks", "csrc/thread_stacks.cpp"),
    ],
    cmdclass={"build_ext": build_ext},
)
