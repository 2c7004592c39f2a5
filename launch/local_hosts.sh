#!/usr/bin/env bash
# A pod on one machine: N processes of a command that find one another over the loopback, each a "host".
#
#   bash launch/local_hosts.sh 2 -- jaxmem train --config=configs/digits_quickstart.py --config.mesh.data=2
#
# Lines that they print get their host in front. SIGTERM and SIGINT go to all. When a host ends with an error, the
# others have PATIENCE_S seconds to end by themselves, then get SIGTERM, and SIGKILL after GRACE_S more. Exit code 75
# (saved a checkpoint and ended as told) is no error: the others may finish saving. The script's exit code is the first
# that was not zero. Works with bash 3.2 and later.
set -uo pipefail

PATIENCE_S=${PATIENCE_S:-3}
GRACE_S=${GRACE_S:-10}
PORT=${PORT:-}                             # of host 0; empty takes a free one
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # devices per host: JAX_NUM_CPU_DEVICES

usage() {
  echo "usage: bash launch/local_hosts.sh N -- COMMAND...   (N hosts, 1 or more)" >&2
  exit 2
}

[[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || usage
HOSTS=$1
shift
if [ "${1:-}" = -- ]; then shift; fi
[ $# -gt 0 ] || usage
if [ -z "$PORT" ]; then
  PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 1
fi

FOLDER=$(mktemp -d) || exit 1
PIDS=()     # of the hosts; "" once a host has ended
LEADERS=()  # the same, kept: each leads a process group of its own
PRINTERS=() # that put the host in front of its lines
FIRST=0     # the first exit code that was not zero
FAILED_AT=  # seconds since the start when a host failed

print_lines() { # HOST: its output, line by line; signals are for the hosts
  local line
  trap '' TERM INT
  while IFS= read -r line || [ -n "$line" ]; do printf '[host %d] %s\n' "$1" "$line"; done
}

start() { # HOST COMMAND...
  local host=$1
  shift
  mkfifo "$FOLDER/$host"
  print_lines "$host" <"$FOLDER/$host" &
  PRINTERS+=($!)
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT JAX_NUM_PROCESSES=$HOSTS JAX_PROCESS_ID=$host \
    "$@" </dev/null >"$FOLDER/$host" 2>&1 &
  PIDS+=($!)
  LEADERS+=($!)
  echo "[local_hosts] host $host is process $!" >&3
}

signal_all() { # SIGNAL, to every host that runs
  local pid
  for pid in "${PIDS[@]}"; do
    if [ -n "$pid" ]; then kill "-$1" "$pid" 2>/dev/null; fi
  done
}

# shellcheck disable=SC2329 # a trap calls it
clean() { # what hosts left running, such as workers of theirs, and the pipes
  local pid
  trap '' TERM INT
  for pid in ${LEADERS[@]+"${LEADERS[@]}"}; do kill -KILL -- "-$pid" 2>/dev/null; done
  for pid in ${PRINTERS[@]+"${PRINTERS[@]}"}; do wait "$pid" 2>/dev/null; done
  rm -rf "$FOLDER"
}

collect() { # the exit codes of hosts that have ended; returns 1 when none runs any more
  local host pid code running=1
  for host in "${!PIDS[@]}"; do
    pid=${PIDS[$host]}
    if [ -z "$pid" ]; then continue; fi
    if kill -0 "$pid" 2>/dev/null; then
      running=0
      continue
    fi
    wait "$pid" 2>/dev/null
    code=$?
    PIDS[host]=
    if [ "$code" -eq 0 ]; then continue; fi
    echo "[local_hosts] host $host ended with exit code $code" >&3
    if [ "$FIRST" -eq 0 ]; then FIRST=$code; fi
    if [ "$code" -ne 75 ] && [ -z "$FAILED_AT" ]; then FAILED_AT=$SECONDS; fi
  done
  return "$running"
}

end_the_others() { # of a host that failed, in steps
  local since=$((SECONDS - FAILED_AT))
  if [ "$since" -ge $((PATIENCE_S + GRACE_S)) ]; then
    signal_all KILL
  elif [ "$since" -ge "$PATIENCE_S" ] && [ -z "${TOLD:-}" ]; then
    TOLD=yes
    signal_all TERM
  fi
}

exec 3>&2 2>/dev/null # bash itself would report every host that a signal ended
trap 'clean' EXIT
trap 'signal_all TERM' TERM
trap 'signal_all INT' INT
set -m # every host in a process group of its own, and none deaf to SIGINT
for ((host = 0; host < HOSTS; host++)); do start "$host" "$@"; done
set +m
while collect; do
  if [ -n "$FAILED_AT" ]; then end_the_others; fi
  sleep 0.1
done
exit "$FIRST"
