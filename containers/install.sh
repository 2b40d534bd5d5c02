#!/usr/bin/env bash
# Install megaphase into a Python that has torch already, and keep that torch.
# usage: install.sh [SOURCE] [PYTHON]
set -euo pipefail
source=$(realpath "${1:-.}")
python=${2:-python3}
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# The tested versions, but torch and triton as they are here.
grep --invert-match --extended-regexp '^(torch|triton)\b' "$source/constraints.txt" > "$constraints"
"$python" - >> "$constraints" <<'PYTHON'
from importlib.metadata import version

print(f"torch=={version('torch')}")
PYTHON
"$python" -m pip install --no-cache-dir --constraint "$constraints" "$source"
# What is installed must fit together, and import.
"$python" -m pip check
"$python" -m megaphase --version
