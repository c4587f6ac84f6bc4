#!/usr/bin/env bash
# All figures of one GPU in under 9 minutes, as text and as JSON: bash benchmarks/gpu.sh [FOLDER] [--toy]
# What matters most comes first. Each part has a limit of its own, and none gets more than is left of the 9 minutes; one
# that hangs or fails leaves the others their time and its rows so far. --toy runs every part at toy size on whatever is
# there, to see that it works.
set -uo pipefail
out=gpu-figures
toy=
for word in "$@"; do
    if [ "$word" = --toy ]; then toy=yes; else out=$word; fi
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export TRANSFORMERS_VERBOSITY=error TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
deadline=525
failed=0

part() { # name, limit in seconds, words of the command
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS))
    shift 2
    limit=$((limit < left ? limit : left))
    if [ "$limit" -le 0 ]; then
        echo "== $name LEFT OUT: no time is left"
        failed=$((failed + 1))
        return 1
    fi
    echo "== $name, at most $limit s: python3 $*"
    if timeout --kill-after=3 "$limit" python3 "$@" --json "$out/$name.json" > >(tee "$out/$name.txt") 2>"$out/$name.err"; then
        echo "== $name took $((SECONDS - start)) s"
    else
        echo "== $name FAILED after $((SECONDS - start)) s:"
        tail -5 "$out/$name.err" # nothing where it ran into its limit
        failed=$((failed + 1))
        return 1
    fi
}

if [ -n "$toy" ]; then
    small="--size toy --rounds 1"
    part flex 150 benchmarks/train_step.py --size toy --attn flex_attention --only check
    part train_step 150 benchmarks/train_step.py $small --sequence-length 256
    part large_step 150 benchmarks/large_step.py $small --sequence-length 256 --ceiling-side 256 ||
        part large_step_again 150 benchmarks/large_step.py $small --sequence-length 256 --ceiling-side 256 --checkpointing
    part prefill_decode 150 benchmarks/prefill_decode.py $small --new-tokens 4
    part distill_step 150 benchmarks/distill_step.py --size toy --rounds 1 --images 8 --ceiling-side 256
    part memory 150 benchmarks/memory.py $small --sequence-length 256
    part unmerged 150 benchmarks/unmerged.py $small --new-tokens 4
else
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    part flex 100 benchmarks/train_step.py --attn flex_attention --only check
    part train_step 80 benchmarks/train_step.py --sequence-length 4096 --sequences 8 --sequences-per-batch 4 --batch 64
    part large_step 150 benchmarks/large_step.py ||
        part large_step_again 110 benchmarks/large_step.py --checkpointing --no-baseline
    part large_step_flex 90 benchmarks/large_step.py --attn flex_attention --no-baseline --rounds 3
    part step_of_135m 60 benchmarks/large_step.py --size smollm2-135m --scale pixels --sequence-length 4096 --sequences 8 --sequences-per-batch 4 --batch 64
    part train_step_flex 70 benchmarks/train_step.py --sequence-length 4096 --sequences 8 --sequences-per-batch 4 --batch 64 --attn flex_attention --only steps
    part prefill_decode 50 benchmarks/prefill_decode.py
    part distill_step 40 benchmarks/distill_step.py --images 256
    part memory 50 benchmarks/memory.py --sequence-length 4096 --sequences 4 --rounds 1
    part unmerged 40 benchmarks/unmerged.py --rounds 5
fi
echo "== all figures"
compgen -G "$out/*.json" >/dev/null && python3 benchmarks/rows.py "$out"/*.json
echo "== $SECONDS s, $failed parts failed; figures in $out"
exit $((failed > 0))
