#!/usr/bin/env bash
# Everything that needs a GPU, in two calls: gpu_check.py says what, and which variables it reads.
#
#     benchmarks/gpu_check.sh OUT first
#     benchmarks/gpu_check.sh OUT second
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
