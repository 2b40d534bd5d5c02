#!/usr/bin/env bash
# Tokenizer and corpora for the sweeps in this folder; see README.md one folder up.
# Usage: prepare.sh CORPORA_DIR [FOLDER], where FOLDER gets tok/ and data/, by default that of this script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
"$here/../../help-corpora/prepare.sh" \
    "${1:?give the folder that holds en.jsonl.gz, fr.jsonl.gz ...}" "${2:-$here}" 2000
cd "${2:-$here}"
"$here/../subsets.sh" data/hi 0.1 0.26 0.1:0.14 0.16:0.2 0.2:0.24
"$here/../subsets.sh" data/eu 0.15 0.38 0.15:0.21 0.228:0.25 0.25:0.32
