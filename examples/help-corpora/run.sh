#!/usr/bin/env bash
# From the help corpora to a two-phase-trained model and its report; see README.md beside this file.
# Usage: run.sh CORPORA_DIR
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
"$folder/prepare.sh" "${1:?give the folder that holds en.jsonl.gz, fr.jsonl.gz ...}"
cd "$folder"
megaphase plan run.yaml
megaphase train run.yaml
megaphase evaluate run.yaml
megaphase report runs/two-phase --out report
