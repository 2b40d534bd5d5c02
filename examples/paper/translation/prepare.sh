#!/usr/bin/env bash
# Tokenizer and corpora for the sweeps in this folder; see README.md one folder up.
# Usage: prepare.sh CORPORA_DIR [FOLDER], where FOLDER gets tok/ and data/, by default that of this script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
pairs=$(cd "${1:?give the folder that holds translation/en-fr.jsonl.gz ...}/translation" && pwd)
cd "${2:-$here}"

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
"$here/../subsets.sh" data/en-hi 0.1 0.65 0.1:0.145 0.145:0.19 0.19:0.235
"$here/../subsets.sh" data/en-eu 0.1 0.65 0.1:0.15 0.15:0.2 0.2:0.26
