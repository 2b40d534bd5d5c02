#!/usr/bin/env bash
# Trains a tokenizer on the help corpora and tokenizes them: tok/ and data/ in a folder, by default
# that of this script. Usage: prepare.sh CORPORA_DIR [FOLDER VOCAB_SIZE]
set -euo pipefail
corpora=$(cd "${1:?give the folder that holds en.jsonl.gz, fr.jsonl.gz ...}" && pwd)
cd "${2:-$(dirname "$0")}"

inputs=()
for language in en fr de hi eu; do
    inputs+=(--input "$language=$corpora/$language.jsonl.gz")
done
megaphase tokenizer train "${inputs[@]}" --vocab-size "${3:-8000}" --out tok --overwrite
for language in en fr de hi eu; do
    megaphase data tokenize "$corpora/$language.jsonl.gz" --tokenizer tok \
        --out "data/$language" --overwrite
done
