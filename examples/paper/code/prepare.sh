#!/usr/bin/env bash
# Tokenizer and corpora for the sweeps in this folder; see README.md one folder up.
# Usage: prepare.sh CORPORA_DIR [FOLDER], where FOLDER gets tok/ and data/, by default that of this script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
code=$(cd "${1:?give the folder that holds code/python.jsonl.gz ...}/code" && pwd)
cd "${2:-$here}"

inputs=()
for language in python perl ruby tcl lua; do
    inputs+=(--input "$language=$code/$language.jsonl.gz")
done
megaphase tokenizer train "${inputs[@]}" --vocab-size 4000 --out tok --overwrite
for language in python perl ruby tcl lua; do
    megaphase data tokenize "$code/$language.jsonl.gz" --tokenizer tok \
        --out "data/$language" --overwrite
done
"$here/../subsets.sh" data/tcl 0.12 0.42 0.12:0.24 0.24:0.36 0.36:0.383
"$here/../subsets.sh" data/lua 0.12 0.42 0.12:0.2 0.2:0.214 0.25:0.3
