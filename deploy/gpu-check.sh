#!/usr/bin/env bash
# Checks a GPU: right values on tiny checkpoints, and speed on the shapes of Qwen2.5-VL-7B against what the hardware
# gives, in some minutes, without downloads. Needs torch, transformers and this repository's own dependencies.
#
#   deploy/gpu-check.sh GPU_REPORT.md                            exit code 0: all as wanted, 1: not, 2: no CUDA here
#   deploy/gpu-check.sh report.md --device cpu --size tiny       a dry run; figures of a CPU are not judged
set -euo pipefail
report=$(realpath -m "${1:?name the file for the report}")
shift
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m tests.gpu.check "$report" "$@"
