# shellcheck shell=bash
# Sourced by the scripts beside it: reads a leading --dry-run, and says what must be set.

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi

# Says which of the named variables are missing, and ends.
need() {
  local variable missing=()
  for variable in "$@"; do [[ -n ${!variable:-} ]] || missing+=("$variable"); done
  if ((${#missing[@]})); then
    echo "$0: set ${missing[*]}; see the head of the script" >&2
    exit 2
  fi
}

# Runs a command, or prints it.
run() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

pids=()
stopped=

# Starts a command beside others, or prints it.
start() {
  if [[ -n $dry_run ]]; then
    run "$@"
  else
    "$@" &
    pids+=($!)
  fi
}

# Passes a signal on: trap stop TERM INT.
stop() {
  stopped=1
  kill -TERM "${pids[@]}" 2>/dev/null || true
}

# Waits for all that was started, and returns the largest status.
finish() {
  local pid code status=0
  for pid in ${pids[@]+"${pids[@]}"}; do
    code=0
    wait "$pid" || code=$?
    # A signal ends the first wait, not the process.
    if [[ -n $stopped ]] && kill -0 "$pid" 2>/dev/null; then
      code=0
      wait "$pid" || code=$?
    fi
    ((code <= status)) || status=$code
  done
  pids=()
  return "$status"
}

# Runs a command up to RETRIES times more, as long as it fails for another reason than a wrong call
# (status 2) or a signal to stop; a run goes on where the last one stopped.
retry() {
  local attempt status
  for ((attempt = 0; ; attempt++)); do
    status=0
    "$@" || status=$?
    if ((status == 0 || status == 2 || attempt >= ${RETRIES:-20})); then return "$status"; fi
    if [[ -n $stopped ]]; then return "$status"; fi
    echo "$0: ended with status $status; starting again ($((attempt + 1)))" >&2
    run sleep "${PAUSE:-10}"
  done
}
