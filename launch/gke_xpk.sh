#!/usr/bin/env bash
# Trains on a GKE cluster that XPK made, on one TPU slice or several.
#
#   NAME=spct CLUSTER=pod ZONE=us-east5-a PROJECT=p TYPE=v5p-256 IMAGE=gcr.io/p/grm_jax:1 \
#   CONFIG=configs/deepseek_grm_27b.py:/data WORKDIR=/data/run \
#     launch/gke_xpk.sh [--dry-run] [flags of grm-jax train]
#
# IMAGE holds grm_jax with its extra [tpu]; WORKDIR must be on a volume that the cluster mounts into
# every pod. SLICES (default 1) are joined by the data-centre network: set --config.mesh.data to as
# many. A workload that is evicted is started again, up to RESTARTS (default 20) times, and goes on
# from the last checkpoint.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need NAME CLUSTER ZONE PROJECT TYPE IMAGE CONFIG WORKDIR
train=$(printf '%q ' grm-jax train --config "$CONFIG" --workdir "$WORKDIR" --distributed "$@")
run xpk workload create --workload "$NAME" --cluster "$CLUSTER" --zone "$ZONE" \
  --project "$PROJECT" --tpu-type "$TYPE" --num-slices "${SLICES:-1}" --docker-image "$IMAGE" \
  --max-restarts "${RESTARTS:-20}" --command "$train"
