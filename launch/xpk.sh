#!/usr/bin/env bash
# A workload on a GKE cluster that xpk made (pip install xpk; xpk cluster create ...): one command, the same on every host.
#
#   bash launch/xpk.sh pvm-8b jaxmem train --config=configs/pvm_qwen3vl.py:8b --config.output=/shared/runs/pvm_8b
#
# Ends a workload: xpk workload delete --workload=pvm-8b --cluster=$CLUSTER. DRY=--dry-run prints what would be done.
set -euo pipefail

CLUSTER=${CLUSTER:-my-cluster}
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16} # topology 4x4
IMAGE=${IMAGE:-us-docker.pkg.dev/my-project/jaxmem:latest} # has jaxmem[tpu] installed
STORAGE=${STORAGE:-shared} # of `xpk storage attach`: the folder that all hosts see
RESTARTS=${RESTARTS:-20} # the same command resumes, so restarting is safe
GRACE_S=${GRACE_S:-120} # for the checkpoint after SIGTERM

[ $# -ge 2 ] || { echo "usage: bash launch/xpk.sh WORKLOAD COMMAND..." >&2; exit 2; }
WORKLOAD=$1
shift

# Exit code 75 is "saved a checkpoint and ended as told"; xpk restarts on 42 and 127 to 255 by itself.
exec xpk workload create ${DRY:+"$DRY"} \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --workload="$WORKLOAD" --tpu-type="$TYPE" --num-slices=1 \
  --docker-image="$IMAGE" --storage="$STORAGE" \
  --max-restarts="$RESTARTS" --restart-on-exit-codes=75 --termination-grace-period-seconds="$GRACE_S" \
  --command="exec $(printf '%q ' "$@")" # exec: SIGTERM goes to the command itself
