#!/usr/bin/env bash
# From the help corpora to a model trained in four phases, and its report; see README.md beside this file.
# Usage: run.sh CORPORA_DIR
set -euo pipefail
corpora=$(cd "${1:?give the folder that holds en.jsonl.gz, fr.jsonl.gz ...}" && pwd)
cd "$(dirname "$0")"

inputs=()
for language in en fr de hi eu; do
    inputs+=(--input "$language=$corpora/$language.jsonl.gz")
done
megaphase tokenizer train "${inputs[@]}" --vocab-size 8000 --out tok --overwrite
for language in en fr de hi eu; do
    megaphase data tokenize "$corpora/$language.jsonl.gz" --tokenizer tok \
        --out "data/$language" --overwrite
done
megaphase plan run.yaml --plot plan.png
megaphase train run.yaml
megaphase evaluate run.yaml
megaphase report runs/four-phases --out report
