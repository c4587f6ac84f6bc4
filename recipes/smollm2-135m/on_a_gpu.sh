#!/usr/bin/env bash
# The whole way on one GPU: distillation, language, the merged model, its figures, and its yardsticks on the same data.
#   bash recipes/smollm2-135m/on_a_gpu.sh FOLDER VIT OUT [--toy]
# FOLDER and VIT: see distill.yaml; OUT: a new folder. The same command goes on where it was stopped. Images have 49
# tokens here, not the 16 of the recipes, which two cores can afford, and steps hold eight times as many. Nobody has run
# it on a GPU; --toy takes two steps of each part on a processor, to see that it works.
set -euo pipefail
folder=$(realpath "$1") vit=$(realpath "$2") out=$3 toy=${4:-}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
vora=(python3 -m vora.cli)
llm=${LLM:-smollm2-135m} # where there is no network: a folder that holds it
image_size=(model.patch_merge=2 model.min_image_tokens=49 model.max_image_tokens=49)
machine=(training.use_cpu=false training.dataloader_num_workers=12 training.save_steps=200)
distill=(training.max_steps=5000 teacher.distill_only_steps=5000 training.per_device_train_batch_size=64) # 1.3 M images
language=(training.max_steps=800 training.per_device_train_batch_size=64)                               # 0.4 M samples
text_only=(training.max_steps=300 training.per_device_train_batch_size=8)
texts=2000 examples=()
if [ "$toy" = --toy ]; then
    machine=(training.use_cpu=true training.save_steps=200)
    distill=(training.max_steps=2 teacher.distill_only_steps=2 training.per_device_train_batch_size=1)
    language=(training.max_steps=2 training.per_device_train_batch_size=1)
    text_only=("${language[@]}")
    texts=2 examples=(--max-samples 12) # of DAQUAR two images
fi

run() { # directory, recipe, overrides: trained, or taken up where it stood
    local directory=$1 recipe=$2 resume=()
    shift 2
    [ -e "$directory/report.md" ] && return
    compgen -G "$directory/checkpoint-*" >/dev/null && resume=(--resume)
    "${vora[@]}" train "$here/$recipe" "$@" data.folder="$folder" --out "$directory" "${resume[@]}"
}

merged() { # directory of a run, folder of its model, further options
    [ -e "$2/config.json" ] || "${vora[@]}" merge "$1" -o "$2" "${@:3}"
}

measured() { # folder of a model: a report of each task, by the commands of README's table
    local model=$1
    score() { [ -e "$model-$1.json" ] || "${vora[@]}" eval -m "$model" --task "$@" -o "$model-$1.json"; }
    score captions --data "$folder"/flickr8k/validation-*.parquet "${examples[@]}"
    score probe --data "$folder"/flickr8k/validation-*.parquet --against other,shuffled "${examples[@]}"
    score classify --data "$folder"/tiny_imagenet/validation-*.parquet "${examples[@]}"
    score vqa --data "$folder"/daquar/validation-*.parquet "${examples[@]}"
    score text --base "$llm" --data "$here/../held_text.jsonl" "${examples[@]}"
}

scripts=$here/../../examples
python3 "$scripts/text_from_llm.py" "$llm" --num "$texts" --out "$folder/text.jsonl"
python3 "$scripts/text_from_llm.py" "$llm" --num "$texts" --kind document --answer-tokens 200 --out "$folder/documents.jsonl"
[ -e "$folder/prose.jsonl" ] || python3 "$scripts/text_from_docstrings.py" --out "$folder/prose.jsonl"

run "$out/distill" distill.yaml model.llm="$llm" teacher.name="$vit" "${image_size[@]}" data.sequence_length=212 "${machine[@]}" "${distill[@]}"
run "$out/language" language.yaml teacher.name="$vit" model.vora="$out/distill" model.min_image_tokens=49 \
    model.max_image_tokens=49 data.sequence_length=260 "${machine[@]}" "${language[@]}"
merged "$out/language" "$out/model" --adapter-out "$out/adapter"
measured "$out/model"

run "$out/llava" llava.yaml model.llm="$llm" model.encoder="$vit" "${image_size[@]}" data.sequence_length=260 "${machine[@]}" "${language[@]}"
merged "$out/llava" "$out/llava-model"
measured "$out/llava-model"

run "$out/text_only" text_only.yaml model.llm="$llm" "${machine[@]}" "${text_only[@]}"
merged "$out/text_only" "$out/text_only-model"
[ -e "$out/text_only-model-probe.json" ] || "${vora[@]}" eval -m "$out/text_only-model" --task probe --of vqa --generate \
    --against other,none --data "$folder"/daquar/validation-*.parquet "${examples[@]}" -o "$out/text_only-model-probe.json"
