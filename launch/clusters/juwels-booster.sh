#!/usr/bin/env bash
# JUWELS Booster (Jülich): 4 A100 of 40 GB a node, InfiniBand, modules.
# usage: juwels-booster.sh ACCOUNT NODES RUN.yaml [option of megaphase launch slurm ...]
# Written after the site's documentation and public job scripts; not run there.
set -euo pipefail
account=$1 nodes=$2 run=$3

# The job inherits the modules, the environment and the variables of this shell.
module --force purge
module load Stages/2025 GCC OpenMPI CUDA cuDNN NCCL Python
source "${MEGAPHASE_VENV:?a virtual environment with megaphase, made with these modules, where all nodes see it}/bin/activate"

# The nodes' names lead to Ethernet; with an i behind them, to InfiniBand.
export MEGAPHASE_HOST_SUFFIX=i
export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
export CUDA_VISIBLE_DEVICES=0,1,2,3

megaphase launch slurm "$run" --nodes "$nodes" --gpus-per-node 4 --cores 12 --memory 40 --time 24:00:00 \
    --partition booster --account "$account" --sbatch '--threads-per-core=1' "${@:4}"
