#!/usr/bin/env bash
# Trains with several processes on this machine, which talk over loopback.
#
#   CONFIG=configs/nano.py WORKDIR=runs/nano launch/local.sh [--dry-run] [flags of grm-jax train]
#
# PROCESSES (default 2), each with DEVICES (default 1) simulated devices; with GPUS=1 each with one
# GPU instead. A process that dies ends all; they are then started again, up to RETRIES (default 20)
# times, and go on from the last checkpoint. SIGTERM and SIGINT go to all and end the run.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need CONFIG WORKDIR
processes=${PROCESSES:-2}
train=(grm-jax train --config "$CONFIG" --workdir "$WORKDIR" --distributed "$@")
trap stop TERM INT

train_all() {
  local i variables port=${PORT:-$((20000 + RANDOM % 20000))}
  for ((i = 0; i < processes; i++)); do
    variables=(
      "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
      "JAX_NUM_PROCESSES=$processes"
      "JAX_PROCESS_ID=$i"
    )
    if [[ -n ${GPUS:-} ]]; then
      variables+=("JAX_LOCAL_DEVICE_IDS=$i")
    else
      variables+=(
        JAX_PLATFORMS=cpu
        "XLA_FLAGS=--xla_force_host_platform_device_count=${DEVICES:-1}"
      )
    fi
    start env "${variables[@]}" "${train[@]}"
  done
  finish
}

retry train_all
