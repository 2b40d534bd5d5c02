#!/usr/bin/env bash
# Jean Zay (IDRIS): 4 H100 of 80 GB a node, modules, accounts by kind of GPU.
# usage: jean-zay.sh PROJECT NODES RUN.yaml [option of megaphase launch slurm ...]
# Written after the site's documentation and public job scripts; not run there.
set -euo pipefail
project=$1 nodes=$2 run=$3

# The job inherits the modules, the environment and the variables of this shell.
module purge
module load arch/h100 pytorch-gpu/py3/2.8.0   # its compilers, CUDA and NCCL; megaphase brings its own torch
source "${MEGAPHASE_VENV:?a virtual environment with megaphase, made with these modules, in \$WORK}/bin/activate"

# 20 hours are the most of the default queue; the job comes back by itself until all phases are done.
megaphase launch slurm "$run" --nodes "$nodes" --gpus-per-node 4 --cores 24 --memory 80 --time 20:00:00 \
    --account "$project@h100" --sbatch '--constraint=h100 --hint=nomultithread' "${@:4}"
