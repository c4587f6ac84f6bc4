#!/usr/bin/env bash
# All figures of one GPU in under 9 minutes, as text and as JSON: bash benchmarks/gpu.sh [FOLDER] [--toy]
# Each part has a limit of its own, so that one that hangs or fails leaves the others their time. --toy runs every
# part at toy size on whatever is there, to see that it works.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONWARNINGS=ignore TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false
out=${1:-gpu-figures}
toy=${2:-}
mkdir -p "$out"
failed=0

part() { # name, limit in seconds, words of the command
    local name=$1 limit=$2
    shift 2
    echo "== $name: python $*"
    local start=$SECONDS
    if timeout "$limit" python "$@" --json "$out/$name.json" > >(tee "$out/$name.txt") 2>"$out/$name.err"; then
        echo "== $name took $((SECONDS - start)) s"
    else
        echo "== $name FAILED after $((SECONDS - start)) s (exit code $?):"
        tail -5 "$out/$name.err"
        failed=$((failed + 1))
    fi
}

if [ "$toy" = --toy ]; then
    small="--size toy --rounds 1"
    part flex 60 benchmarks/flex.py
    part train_step 60 benchmarks/train_step.py $small --row-tokens 256
    part prefill_decode 60 benchmarks/prefill_decode.py $small --new-tokens 4
    part mask 60 benchmarks/mask.py --tokens 256 --rounds 1
    part memory 120 benchmarks/memory.py --size toy --row-tokens 256 --grow-tokens 16 64 --grow-batch
    part large_step 60 benchmarks/large_step.py $small --row-tokens 256 --ceiling-side 256
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    part flex 60 benchmarks/flex.py
    part train_step 60 benchmarks/train_step.py --row-tokens 4096 --rows 4 --rows-per-batch 1 --batch 16
    part train_step_flex 50 benchmarks/train_step.py --row-tokens 4096 --rows 4 --rows-per-batch 1 --batch 16 --attn flex_attention --no-check
    part prefill_decode 40 benchmarks/prefill_decode.py
    part mask 20 benchmarks/mask.py
    part memory 110 benchmarks/memory.py --row-tokens 4096 --rows 1 --grow-tokens 256 1024 4096 --grow-batch
    part large_step 120 benchmarks/large_step.py --size qwen2.5-7b
    part large_step_flex 70 benchmarks/large_step.py --size qwen2.5-7b --attn flex_attention --no-baseline --rounds 3
fi
echo "== $SECONDS s, $failed parts failed; figures in $out"
exit $((failed > 0))
