#!/usr/bin/env bash
# Tokenizer and corpora for the sweeps in this folder; see README.md one folder up.
# Usage: prepare.sh CORPORA_DIR
set -euo pipefail
pairs=$(cd "${1:?give the folder that holds translation/en-fr.jsonl.gz ...}/translation" && pwd)
cd "$(dirname "$0")"

inputs=() tags=()
for language in fr hi eu; do
    inputs+=(--input "en-$language=$pairs/en-$language.jsonl.gz")
    tags+=(--tag "$language")
done
megaphase tokenizer train "${inputs[@]}" "${tags[@]}" --template "{src}\n{tgt}" \
    --vocab-size 4000 --out tok --overwrite
for language in fr hi eu; do
    megaphase data tokenize "$pairs/en-$language.jsonl.gz" --tokenizer tok --source-key src \
        --target-key tgt --tag "$language" --out "data/en-$language" --overwrite
done
