#!/usr/bin/env bash
# Judges one file with several processes on this machine, and joins their results in order.
#
#   launch/judge_shards.sh FILE.jsonl RESULTS.jsonl [flags of grm-jax judge]
#
# SHARDS (default 2) processes take every SHARDS-th record. Each can be killed at any time: the same
# command goes on where it stopped. DRY_RUN=1 prints what would run.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 FILE.jsonl RESULTS.jsonl [flags of grm-jax judge]" >&2
  exit 2
fi
input=$1 output=$2
shift 2
shards=${SHARDS:-2}
work="$output.shards"
if [[ -n ${DRY_RUN:-} ]]; then
  for ((i = 0; i < shards; i++)); do
    echo "grm-jax judge $work/$i.in.jsonl --output $work/$i.out.jsonl $*"
  done
  echo "the results go to $output"
  exit 0
fi

mkdir -p "$work"
for ((i = 0; i < shards; i++)); do
  awk -v n="$shards" -v i="$i" 'NF && count++ % n == i' "$input" >"$work/$i.in.jsonl"
done
pids=() results=()
for ((i = 0; i < shards; i++)); do
  grm-jax judge "$work/$i.in.jsonl" --output "$work/$i.out.jsonl" "$@" &
  pids+=($!) results+=("$work/$i.out.jsonl")
done
status=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  ((code <= status)) || status=$code
done
if ((status > 1)); then
  echo "a process failed with status $status; run the same command again to go on" >&2
  exit "$status"
fi
# The shards took turns, and so do their results.
paste -d '\n' "${results[@]}" | sed '/^$/d' >"$output.partial"
mv "$output.partial" "$output"
exit "$status"
