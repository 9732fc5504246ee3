#!/usr/bin/env bash
# Trains on a TPU slice of Google Cloud, and asks for another when it is taken away.
#
#   NAME=spct ZONE=us-east5-a TYPE=v5p-256 SOURCE=gs://bucket/grm_jax.whl BUCKET=bucket \
#   CONFIG=configs/deepseek_grm_27b.py:/mnt/bucket/data WORKDIR=/mnt/bucket/run \
#     launch/tpu.sh [--dry-run] [flags of grm-jax train]
#
# TYPE counts as Google does: v5p-256 is 128 chips. The slice comes from a queued resource, which
# waits until there is one; QUEUED=0 asks for a TPU VM at once. SPOT=1 takes one that may be taken
# away. SOURCE is what pip installs (a wheel in a bucket, or a git URL); the folder of CONFIG is
# copied to every host. BUCKET is mounted there at /mnt/BUCKET, where WORKDIR must be. RUNTIME and PROJECT are optional, KEEP=1 keeps the
# slice at the end, and up to RETRIES (default 20) slices are asked for.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need NAME ZONE TYPE SOURCE CONFIG WORKDIR
case $TYPE in
  v5lite*) runtime=v2-alpha-tpuv5-lite ;;
  v5p*) runtime=v2-alpha-tpuv5 ;;
  v6e*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac
runtime=${RUNTIME:-$runtime}
place=(--zone "$ZONE")
if [[ -n ${PROJECT:-} ]]; then place+=(--project "$PROJECT"); fi
kind=(--accelerator-type "$TYPE")
if [[ -n ${SPOT:-} ]]; then kind+=(--spot); fi
tpus=(gcloud compute tpus)

create() {
  if [[ ${QUEUED:-1} == 0 ]]; then
    run "${tpus[@]}" tpu-vm create "$NAME" "${place[@]}" "${kind[@]}" --version "$runtime"
    return
  fi
  run "${tpus[@]}" queued-resources create "$NAME" --node-id "$NAME" "${place[@]}" "${kind[@]}" \
    --runtime-version "$runtime"
  local state
  until [[ ${state:-} == ACTIVE ]]; do
    state=$(run "${tpus[@]}" queued-resources describe "$NAME" "${place[@]}" \
      --format 'value(state.state)')
    case $state in
      ACTIVE) ;;
      FAILED | SUSPEND*) return 1 ;;
      gcloud*) echo "$state" && state=ACTIVE ;; # what a dry run prints
      *) sleep 60 ;;
    esac
  done
}

delete() {
  if [[ ${QUEUED:-1} == 0 ]]; then
    run "${tpus[@]}" tpu-vm delete "$NAME" "${place[@]}" --quiet
  else
    run "${tpus[@]}" queued-resources delete "$NAME" "${place[@]}" --force --quiet
  fi
}

everywhere() {
  run "${tpus[@]}" tpu-vm ssh "$NAME" "${place[@]}" --worker=all --command "$1"
}

copy_configs() {
  local folder=${CONFIG%%:*}
  run "${tpus[@]}" tpu-vm scp --recurse "$(dirname "$folder")" "$NAME:" "${place[@]}" --worker=all
}

setup='python3 -m venv ~/grm && ~/grm/bin/pip install -q'
if [[ $SOURCE == gs://* ]]; then
  wheel=/tmp/$(basename "$SOURCE")
  setup="gcloud storage cp '$SOURCE' '$wheel' && $setup '${wheel}[tpu]'"
else
  setup="$setup 'grm_jax[tpu] @ $SOURCE'"
fi
if [[ -n ${BUCKET:-} ]]; then
  setup+=" && sudo install -d -o \"\$USER\" '/mnt/$BUCKET'"
  setup+=" && { mountpoint -q '/mnt/$BUCKET' || gcsfuse --implicit-dirs '$BUCKET' '/mnt/$BUCKET'; }"
fi
train=$(printf '%q ' grm-jax train --config "$CONFIG" --workdir "$WORKDIR" --distributed "$@")

# A slice that failed to train may be a slice that is gone, so the next attempt has a new one.
attempt() {
  local status=0
  create && everywhere "$setup" && copy_configs && everywhere "PATH=\$HOME/grm/bin:\$PATH $train" || status=$?
  if ((status)) || [[ -z ${KEEP:-} ]]; then delete; fi
  return "$status"
}

retry attempt
