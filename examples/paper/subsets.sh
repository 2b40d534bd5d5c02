#!/usr/bin/env bash
# Corpora PREFIX-1, PREFIX-2 ... with the same held-out documents and different, few documents to train on, for the
# sweeps in annealing/. Documents are chosen by their hashes, as fractions of all: those below VALIDATION and those from
# TEST up are in each of these corpora, those from START to END in one of them.
# Usage: subsets.sh PREFIX VALIDATION TEST START:END START:END ...
set -euo pipefail
prefix=$1 validation=$2 test=$3
shift 3
parts=$prefix-parts
mkdir -p "$parts"
split() {  # split PREFIX FRACTION BELOW ABOVE
    megaphase data split "$1" --fraction "$2" --held-out "$3" --train "$4" --overwrite
}
split "$prefix" "$validation" "$parts/validation" "$parts/rest"
split "$prefix" "$test" "$parts/rest" "$parts/test"
number=0
for range in "$@"; do
    number=$((number + 1))
    split "$prefix" "${range#*:}" "$parts/below" "$parts/rest"
    split "$parts/below" "${range%:*}" "$parts/rest" "$parts/train"
    megaphase data merge "$parts/validation" "$parts/train" "$parts/test" \
        --out "$prefix-$number" --overwrite
done
rm -r "$parts"
