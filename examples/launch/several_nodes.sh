#!/usr/bin/env bash
# On each of several machines: HEAD is the name of one of them. Recipe, data and RUN lie where all of them see them.
#   HEAD=node0 NUM_NODES=4 bash several_nodes.sh mine.yaml /shared/runs/mine [key=value ...] [--resume]
set -euo pipefail
recipe=$1 out=$2
shift 2
exec torchrun --nnodes "$NUM_NODES" --nproc_per_node "${NUM_GPUS:-gpu}" --rdzv_backend c10d \
  --rdzv_endpoint "$HEAD:29500" --rdzv_id "$(basename "$out")" -m vora.cli train "$recipe" --out "$out" "$@"
