#!/usr/bin/env bash
# Trains on nodes of a SLURM cluster; a login node is the place to call it.
#
#   CONFIG=configs/deepseek_grm_27b.py:DATA WORKDIR=/shared/run NODES=16 launch/slurm.sh [--dry-run] [flags of grm-jax train]
#
# WORKDIR must be seen by all nodes. GPUS (default 8) of each node, PER=gpu for a process a GPU or
# PER=node (default) for a process a node. TIME (default 24:00:00) is the longest a job may take: it
# saves and queues itself again NOTICE (default 300) seconds before. NAME, PARTITION, ACCOUNT and
# SETUP (a command that prepares a node, such as activating an environment) are optional.
set -euo pipefail

# What a node's processes run. JAX gives a process of SLURM one device unless it is told otherwise.
if [[ ${1:-} == --process ]]; then
  shift
  if [[ $PER == node ]]; then
    JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((GPUS - 1)))
    export JAX_LOCAL_DEVICE_IDS
  fi
  if [[ -n ${SETUP:-} ]]; then eval "$SETUP"; fi
  exec grm-jax train --config "$CONFIG" --workdir "$WORKDIR" --distributed "$@"
fi

# What the job runs: one step of all processes, and itself again when its time is up.
if [[ ${1:-} == --job ]]; then
  script=$2
  shift 2
  again=
  trap 'again=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  srun --kill-on-bad-exit=1 bash "$script" --process "$@" &
  step=$!
  status=0
  wait "$step" || status=$?
  if [[ -n $again ]]; then
    wait "$step" || true
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
fi

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$folder/common.sh"
need CONFIG WORKDIR
export CONFIG WORKDIR PER=${PER:-node} GPUS=${GPUS:-8} SETUP=${SETUP:-}
tasks=1
if [[ $PER == gpu ]]; then tasks=$GPUS; fi
options=(
  "--job-name=${NAME:-grm-jax}" "--nodes=${NODES:-1}" "--gpus-per-node=$GPUS"
  "--ntasks-per-node=$tasks" --gpu-bind=none "--time=${TIME:-24:00:00}"
  "--signal=B:USR1@${NOTICE:-300}" --requeue --open-mode=append --exclusive
)
if [[ -n ${PARTITION:-} ]]; then options+=("--partition=$PARTITION"); fi
if [[ -n ${ACCOUNT:-} ]]; then options+=("--account=$ACCOUNT"); fi
run sbatch "${options[@]}" "$folder/slurm.sh" --job "$folder/slurm.sh" "$@"
