#!/usr/bin/env bash
# The tests: a virtual environment with the test extra (torch included, as their oracle), then pytest on the CPU, one
# process per core.
# Further words are passed to pytest, e.g. -k config, or -m slow for the slowest tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh

prepare test
export JAX_PLATFORMS=cpu
exec python -m pytest -n auto --dist loadfile "$@"
