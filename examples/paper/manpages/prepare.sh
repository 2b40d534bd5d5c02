#!/usr/bin/env bash
# Tokenizer and corpora for the sweeps in this folder; see README.md one folder up.
# Usage: prepare.sh CORPORA_DIR [FOLDER], where FOLDER gets tok/ and data/, by default that of this script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
pairs=$(cd "${1:?give the folder that holds translation/manpages/en-fr.jsonl.gz ...}/translation/manpages" && pwd)
cd "${2:-$here}"

inputs=()
for task in en-fr en-ro en-ro-more; do
    inputs+=(--input "$task=$pairs/$task.jsonl.gz")
done
megaphase tokenizer train "${inputs[@]}" --tag fr --tag ro --template "{src}\n{tgt}" \
    --vocab-size 4000 --out tok --overwrite
for task in en-fr en-ro en-ro-more; do
    language=${task#en-}
    megaphase data tokenize "$pairs/$task.jsonl.gz" --tokenizer tok --source-key src \
        --target-key tgt --tag "${language%-more}" --out "data/$task" --overwrite
done
"$here/../subsets.sh" data/en-ro 0.1 0.65 0.1:0.116 0.116:0.132 0.132:0.148
