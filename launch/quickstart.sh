#!/usr/bin/env bash
# The quickstart: a virtual environment, the install, then a memory trained on the shipped tiny model and real digits.
# Further words are passed to the job, e.g. --config.seed=1.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

JOB=(jaxmem train --config=configs/digits_quickstart.py)

prepare digits
echo "running: ${JOB[*]} $*"
exec "${JOB[@]}" "$@"
