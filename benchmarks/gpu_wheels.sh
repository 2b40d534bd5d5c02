#!/bin/bash
# Collect what a GPU machine without a network is missing to run Megaphase and benchmarks/gpu.py.
#
#     benchmarks/gpu_wheels.sh FOLDER [PRESENT]
#
# Writes wheels for Linux on x86-64 and Python 3.12 into FOLDER (another Python: PYTHON_VERSION=3.13),
# and install.sh. torch and its own dependencies are taken to be there. PRESENT is a file with the
# names of other packages that are there, one a line (such as the output of `pip list --format
# freeze` there); without it, everything else is collected. DeepSpeed, of which there are no wheels,
# is built here without its own kernels, which nothing here uses. Megaphase is built with the
# program pythonX.Y if there is one with its headers; otherwise its sources are put into FOLDER, and
# install.sh builds it on the GPU machine, which then needs g++, setuptools and pybind11.
set -euo pipefail

usage() { sed -n '2,5p' "$0" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] || usage
PYTHON=${PYTHON:-python3}
VERSION=${PYTHON_VERSION:-3.12}
REPOSITORY=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
FOLDER=$(cd "$1" && pwd)
PRESENT=${2:-/dev/null}
[ -r "$PRESENT" ] || { echo "$PRESENT: cannot be read" >&2; exit 2; }
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# pip compares these names exactly, so each glibc has its own.
platforms=(any)
for glibc in 39 35 34 31 28 27 24 17; do platforms+=("manylinux_2_${glibc}_x86_64"); done
platforms+=(manylinux2014_x86_64 manylinux2010_x86_64 manylinux1_x86_64)
target=(--python-version "$VERSION" --implementation cp --only-binary=:all:)
for each in "${platforms[@]}"; do target+=(--platform "$each"); done

echo "DeepSpeed, without its own kernels"
deepspeed=$(grep '^deepspeed==' "$REPOSITORY/constraints.txt")
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -qq --no-deps --wheel-dir "$FOLDER" "$deepspeed"

echo "names of what Megaphase, DeepSpeed and the benchmarks need, without torch's own"
# Transformers is the plain loop's model; without it that part is left out.
"$PYTHON" - "$REPOSITORY" "$FOLDER" >"$WORK/requirements" <<'PROGRAM'
import sys, tomllib, zipfile
from email import message_from_bytes
from pathlib import Path

repository, folder = map(Path, sys.argv[1:])
project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
needed = list(project["dependencies"])
needed += [each for each in project["optional-dependencies"]["benchmark"] if each.startswith("transformers")]
for wheel in folder.glob("deepspeed-*.whl"):
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needed += message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
for each in needed:
    if not each.startswith(("torch", "deepspeed")) and "extra ==" not in each:
        print(each)
PROGRAM
"$PYTHON" -m pip install -qq --dry-run --ignore-installed --target "$WORK/none" \
    -c "$REPOSITORY/constraints.txt" "${target[@]}" --report "$WORK/report.json" \
    -r "$WORK/requirements"

"$PYTHON" - "$WORK/report.json" "$PRESENT" >"$WORK/missing" <<'PROGRAM'
import json, re, sys

def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()

# What torch itself needs is there with it.
there = {"torch", "triton", "filelock", "typing-extensions", "sympy", "mpmath", "networkx", "jinja2"}
there |= {"markupsafe", "fsspec"}
for line in open(sys.argv[2]):
    for name in re.split(r"[,\s]+", line.split("=")[0].split("@")[0].strip()):
        there.add(plain(name))
for each in json.load(open(sys.argv[1]))["install"]:
    name, version = each["metadata"]["name"], each["metadata"]["version"]
    if plain(name) not in there:
        print(f"{name}=={version}")
PROGRAM
echo "$(wc -l <"$WORK/missing") packages: $(tr '\n' ' ' <"$WORK/missing")"
if [ -s "$WORK/missing" ]; then
    "$PYTHON" -m pip download -qq --no-deps "${target[@]}" --dest "$FOLDER" -r "$WORK/missing"
fi

headers='import os, sysconfig; print(os.path.join(sysconfig.get_paths()["include"], "Python.h"))'
rm -f "$FOLDER"/megaphase-*
builder=${TARGET_PYTHON:-python$VERSION}
if command -v "$builder" >/dev/null && include=$("$builder" -c "$headers" 2>/dev/null) && [ -f "$include" ]; then
    echo "Megaphase, built with $builder"
    mkdir "$WORK/sources"
    git -C "$REPOSITORY" archive HEAD | tar -x -C "$WORK/sources"
    "$builder" -m pip wheel -qq --no-deps --wheel-dir "$FOLDER" "$WORK/sources"
else
    echo "Megaphase's sources: there is no $builder with headers here"
    git -C "$REPOSITORY" archive --prefix=megaphase/ -o "$FOLDER/megaphase-sources.tar" HEAD
fi

cat >"$FOLDER/install.sh" <<'INSTALL'
#!/bin/bash
# Install into a folder (default /tmp/megaphase-packages), beside what is there. Use it with
#     source install.sh [FOLDER] && python3 benchmarks/gpu.py
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
site=${1:-/tmp/megaphase-packages}
python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$here"/*.whl &&
if [ -f "$here/megaphase-sources.tar" ]; then
    sources=$(mktemp -d) && tar -xf "$here/megaphase-sources.tar" -C "$sources" &&
    python3 -m pip install --quiet --no-index --no-deps --no-build-isolation --upgrade \
        --target "$site" "$sources/megaphase"
fi &&
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
INSTALL
du -sh "$FOLDER"
echo "there:  source $(basename "$FOLDER")/install.sh && python3 benchmarks/gpu.py"
