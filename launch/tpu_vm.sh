#!/usr/bin/env bash
# Cloud TPU VMs, one host or many: rent them, install this working tree on all, run one command on all, look, give back.
#
#   bash launch/tpu_vm.sh create            # or: create spot, create queued (waits in a queue for capacity; also spot)
#   bash launch/tpu_vm.sh install           # tracked files as they are here, into ~/jaxmem on every host
#   bash launch/tpu_vm.sh mount             # the folder that all hosts see
#   bash launch/tpu_vm.sh run jaxmem train --config=configs/pvm_qwen3vl.py:8b --config.output=/mnt/shared/runs/pvm_8b
#   bash launch/tpu_vm.sh logs              # of host 0; logs 3: of host 3
#   bash launch/tpu_vm.sh status            # running, or the exit code, of every host
#   bash launch/tpu_vm.sh stop              # saves a checkpoint and ends (exit code 75); `run` again resumes
#   bash launch/tpu_vm.sh delete
#
# Every value can also come from the environment: ZONE=us-east5-a bash launch/tpu_vm.sh create
set -euo pipefail
cd "$(dirname "$0")/.."

NAME=${NAME:-jaxmem}
ZONE=${ZONE:-us-west4-a}
TYPE=${TYPE:-v5litepod-16}              # 4 hosts with 4 chips each, topology 4x4
VERSION=${VERSION:-v2-alpha-tpuv5-lite} # the VM's software: v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e
SHARE=${SHARE:-gs://my-bucket}          # a bucket, or Filestore as 10.0.0.2:/share
MOUNT=${MOUNT:-/mnt/shared}             # where hosts see it
PYTHON=${PYTHON:-3.12}

usage() {
  sed -n '4,11s/^#   //p' launch/tpu_vm.sh >&2
  exit 2
}

on_hosts() { # WORKER SCRIPT: runs it there; WORKER is a number or "all"
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"
}

create() {
  local size=(--zone="$ZONE" --accelerator-type="$TYPE")
  case "${1:-}" in
    "") gcloud compute tpus tpu-vm create "$NAME" "${size[@]}" --version="$VERSION" ;;
    spot) gcloud compute tpus tpu-vm create "$NAME" "${size[@]}" --version="$VERSION" --spot ;;
    queued)
      gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${size[@]}" \
        --runtime-version="$VERSION" "${@:2}" # more words are passed on: create queued --spot
      echo "look: gcloud compute tpus queued-resources describe $NAME --zone=$ZONE" >&2
      ;;
    *) usage ;;
  esac
}

install() { # uv brings the Python that jaxmem needs; the VMs' own is older
  local archive
  archive=$(mktemp -d)/jaxmem.tar.gz
  git ls-files -z | tar -czf "$archive" --null -T -
  gcloud compute tpus tpu-vm scp "$archive" "$NAME:" --zone="$ZONE" --worker=all
  rm -r "$(dirname "$archive")"
  on_hosts all "set -e; mkdir -p jaxmem; tar -xzf jaxmem.tar.gz -C jaxmem; cd jaxmem
python3 -m pip install --quiet --user uv
[ -d .venv ] || ~/.local/bin/uv venv --quiet --python $PYTHON .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python -e '.[tpu]'
.venv/bin/jaxmem --help >/dev/null && echo \"\$(hostname): installed\""
}

mount_share() {
  local how
  case "$SHARE" in
    gs://*) how="command -v gcsfuse >/dev/null || { echo 'install gcsfuse first' >&2; exit 1; }
gcsfuse --implicit-dirs ${SHARE#gs://} $MOUNT" ;;
    *) how="sudo apt-get install --quiet --yes nfs-common >/dev/null; sudo mount -t nfs $SHARE $MOUNT" ;;
  esac
  on_hosts all "set -e; mountpoint -q $MOUNT && exit; sudo mkdir -p $MOUNT; sudo chown \$USER $MOUNT
$how"
}

run() { # COMMAND...: detached, so that it outlives this connection; output in ~/jaxmem/run.log
  [ $# -gt 0 ] || usage
  local words
  words=$(printf '%q ' "$@")
  on_hosts all "cd jaxmem
if [ ! -e run.exit ] && kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null; then echo \"\$(hostname): already running\" >&2; exit 1; fi
rm -f run.exit; export PATH=\$PWD/.venv/bin:\$PATH COMMAND=$(printf '%q' "$words")
nohup bash -c 'trap : TERM; eval \"\$COMMAND\"; echo \$? >run.exit' >run.log 2>&1 </dev/null &
echo \$! >run.pid"
}

status() {
  on_hosts all "cd jaxmem
if [ -e run.exit ]; then echo \"\$(hostname): ended with exit code \$(cat run.exit)\"
elif kill -0 \$(cat run.pid 2>/dev/null) 2>/dev/null; then echo \"\$(hostname): running\"
else echo \"\$(hostname): not running\"; fi"
}

delete() {
  if gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" >/dev/null 2>&1; then
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
  else
    gcloud compute tpus tpu-vm delete "$NAME" --zone="$ZONE" --quiet
  fi
}

case "${1:-}" in
  create) create "${@:2}" ;;
  install) install ;;
  mount) mount_share ;;
  run) run "${@:2}" ;;
  logs) on_hosts "${2:-0}" "tail -n 100 -F jaxmem/run.log" ;;
  status) status ;;
  stop) on_hosts all "pkill -TERM -P \$(cat jaxmem/run.pid)" ;;
  delete) delete ;;
  *) usage ;;
esac
