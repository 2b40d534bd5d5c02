#!/usr/bin/env bash
# Tokenizer and corpora for the sweeps in this folder; see README.md one folder up.
# Usage: prepare.sh CORPORA_DIR
set -euo pipefail
folder=$(cd "$(dirname "$0")" && pwd)
"$folder/../../help-corpora/prepare.sh" \
    "${1:?give the folder that holds en.jsonl.gz, fr.jsonl.gz ...}" "$folder" 2000
