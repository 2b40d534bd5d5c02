#!/usr/bin/env bash
# From a published model to one with more languages; see README.md beside this file.
# Usage: run.sh MODEL_DIR CORPORA OUT [KEY.PATH=VALUE ...]
set -euo pipefail

old=(en fr de)             # languages of the model, which it is to keep
new=(hi eu)                # languages that it is to learn
add=${ADD:-4000}           # tokens by which the vocabulary grows
seq_len=${SEQ_LEN:-2048}   # sequence length of the training
processes=${PROCESSES:-1}  # GPUs of this machine
stop_after=${STOP_AFTER:-6}  # 4 ends before the training

here=$(cd "$(dirname "$0")" && pwd)
model=$(cd "${1:?give the folder of the published model}" && pwd)
corpora=$(cd "${2:?give the folder that holds en.jsonl.gz, hi.jsonl.gz ...}" && pwd)
mkdir -p "${3:?give a folder for the results}"
cd "$3"
changes=("${@:4}")         # of the run file

heading() { printf '\n== %s\n' "$*"; }

# 1. The model's weights, and a copy of its tokenizer without tokens for which the model has no rows.
heading "1. convert from-hf"
[ -d base ] || megaphase convert from-hf "$model" --out base
if [ ! -d base/tokenizer ]; then
    echo "$PWD/base has no tokenizer: remove it, and see what convert from-hf says of the model's" >&2
    exit 2
fi

# 2. A tokenizer with tokens of the new languages, all ids of the model's own tokenizer as they are; the
# model with rows for these tokens, and its loss on the old languages before and after.
heading "2. tokenizer extend, convert extend-vocab: $add tokens for ${new[*]}"
learn=() check=()
for language in "${new[@]}"; do learn+=(--input "$language=$corpora/$language.jsonl.gz"); done
for language in "${old[@]}"; do check+=(--check "$language=$corpora/$language.jsonl.gz"); done
[ -d tokenizer ] || megaphase tokenizer extend base/tokenizer "${learn[@]}" "${check[@]}" \
    --add "$add" --out tokenizer
[ -d extended ] || megaphase convert extend-vocab base --tokenizer tokenizer --out extended "${check[@]}"

# 3. All languages, old and new, in the new tokenizer's tokens.
heading "3. data tokenize: ${old[*]} ${new[*]}"
for language in "${old[@]}" "${new[@]}"; do
    [ -f "data/$language.json" ] || megaphase data tokenize "$corpora/$language.jsonl.gz" \
        --tokenizer tokenizer --out "data/$language" --overwrite
done

# 4. The run file: the phases of joint.yaml, and the model as it was converted.
heading "4. plan: run.yaml"
{
    cat "$here/joint.yaml"
    echo "tokenizer: tokenizer"
    sed "s/^  seq_len: .*/  seq_len: $seq_len/" extended/model.yaml
} > run.yaml
megaphase plan run.yaml --processes "$processes" "${changes[@]}"
[ "$stop_after" -gt 4 ] || exit 0

# 5. Training. Started again, it resumes from its newest checkpoint.
heading "5. launch local: training"
megaphase launch local run.yaml --processes "$processes" --from extended "${changes[@]}"

# 6. Losses on held-out text of all languages, a report, and the model for transformers.
heading "6. evaluate, report, convert to-hf"
megaphase launch local run.yaml --processes "$processes" --command evaluate "${changes[@]}"
megaphase report run --out report
[ -d hf ] || megaphase convert to-hf run@joint --out hf
