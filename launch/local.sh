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
pids=() stopped=

stop() {
  stopped=1
  kill -TERM "${pids[@]}" 2>/dev/null || true
}
trap stop TERM INT

start_all() {
  local i pid code status=0 variables
  local port=${PORT:-$((20000 + RANDOM % 20000))}
  pids=()
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
    if [[ -n $dry_run ]]; then
      run env "${variables[@]}" "${train[@]}"
    else
      env "${variables[@]}" "${train[@]}" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    code=0
    # A signal ends the first wait, not the process.
    wait "$pid" || code=$?
    if ((code > 128)) && kill -0 "$pid" 2>/dev/null; then
      code=0
      wait "$pid" || code=$?
    fi
    ((code <= status)) || status=$code
  done
  if [[ -n $stopped ]]; then exit "$status"; fi
  return "$status"
}

retry start_all
