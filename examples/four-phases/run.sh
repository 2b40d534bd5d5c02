#!/usr/bin/env bash
# From the help corpora to a model trained in four phases, and its report; see README.md beside this
# file. Usage: run.sh CORPORA_DIR
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
"$folder/../help-corpora/prepare.sh" "${1:?give the folder that holds en.jsonl.gz, fr.jsonl.gz ...}"
cd "$folder"
megaphase plan run.yaml --plot plan.png
megaphase train run.yaml
megaphase evaluate run.yaml
megaphase report runs/four-phases --out report
