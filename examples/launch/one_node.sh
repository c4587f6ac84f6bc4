#!/usr/bin/env bash
# One machine, one process for each GPU. The same command with --resume goes on, with as many GPUs as there are then.
#   bash one_node.sh mine.yaml runs/mine [key=value ...] [--resume]
set -euo pipefail
recipe=$1 out=$2
shift 2
exec torchrun --standalone --nproc_per_node "${NUM_GPUS:-gpu}" -m vora.cli train "$recipe" --out "$out" "$@"
