#!/usr/bin/env bash
# Trains on the GPUs of this machine.
#
#   CONFIG=configs/gemma2_2b.py:FILE WORKDIR=runs/gemma2 launch/node.sh [--dry-run] [flags of grm-jax train]
#
# One process has all GPUs, which needs least memory of the host. With PER=gpu and GPUS=8 each GPU has
# a process of its own, as on SLURM. A run that fails is started again up to RETRIES (default 20)
# times and goes on from the last checkpoint.
set -euo pipefail
folder=$(dirname "${BASH_SOURCE[0]}")
if [[ ${PER:-node} == gpu ]]; then
  PROCESSES=${GPUS:?say how many GPUs there are} exec "$folder/local.sh" "$@"
fi
# shellcheck source=launch/common.sh
source "$folder/common.sh"
need CONFIG WORKDIR
trap stop TERM INT

train() {
  start grm-jax train --config "$CONFIG" --workdir "$WORKDIR" "$@"
  finish
}

retry train "$@"
