#!/usr/bin/env bash
# Tokenizer and corpora for the sweeps in this folder; see README.md one folder up.
# Usage: prepare.sh CORPORA_DIR
set -euo pipefail
corpora=$(cd "${1:?give the folder that holds en.jsonl.gz, fr.jsonl.gz ...}" && pwd)
cd "$(dirname "$0")"

inputs=()
for language in en fr de hi eu; do
    inputs+=(--input "$language=$corpora/$language.jsonl.gz")
done
megaphase tokenizer train "${inputs[@]}" --vocab-size 2000 --out tok --overwrite
for language in en fr de hi eu; do
    megaphase data tokenize "$corpora/$language.jsonl.gz" --tokenizer tok \
        --out "data/$language" --overwrite
done
