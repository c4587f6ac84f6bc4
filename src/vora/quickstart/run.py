"""`vora quickstart`: fetch, train, merge, measure, report."""

import json
import math
import os
import resource
import sys
import time
import timeit
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from transformers import PreTrainedModel

from vora.build.base_llm import load_llm, load_tokenizer
from vora.checkpoint.card import Evaluation, write_run_card
from vora.checkpoint.load import merge_run
from vora.checkpoint.save import save_merged
from vora.data.few_answers import few_answers
from vora.data.readers import load_source
from vora.data.schema import Sample
from vora.eval.run import evaluate
from vora.eval.tasks.exact import majority_accuracy
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor
from vora.model.segmented_sdpa import use_segmented_sdpa_on_cpu
from vora.quickstart.page import write_report
from vora.train.recipe import load_recipe
from vora.train.run import train
from vora.train.throughput import TooLittleTime, precision_overrides

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of `ru_maxrss`
LoadedModel: TypeAlias = tuple[VoraForConditionalGeneration, VoraProcessor]
NUM_SHOWN = 12
FEWEST_TRAINING_MINUTES, MOST_TRAINING_MINUTES = 1.0, 9.0
TOKENS_PER_QUESTION = 5  # that the bare LLM reads in the time of a question: each image is read once
TOKENS_PER_DISTILL_STEP = 350  # that the bare LLM reads in the time of a step that only distills


def run_quickstart(
    out: str | Path, *, llm: str = "smollm2-135m", minutes: float = 13.0, seed: int = 0,
    overrides: Sequence[str] = (), console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Train a model that sees, measure it, and leave in `out` report.html, model/, the run directory run/,
    evaluation.json, and result.json, whose content is returned.

    Args:
        llm: alias, folder or hub id.
        minutes: for everything once the packages are fetched; a slow machine trains for fewer steps.
        overrides: of the recipe, `key=value`.

    Raises:
        ValueError: `out` is not empty, or `minutes` are too few; the message says how many would do.
        ConnectionError: the packages cannot be fetched.
    """
    start, out = time.monotonic(), Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or delete it.")
    out.mkdir(parents=True, exist_ok=True)
    sources = {split: load_source("easy-vqa", split) for split in ("train", "test")}
    samples = {split: [source[i] for i in range(len(source))] for split, source in sources.items()}
    num_questions = sum(len(sample.conversations) for sample in samples["test"])
    console.print("[1/5] Fetching and unpacking the LLM (once)")
    load_tokenizer(llm)
    token_seconds = forward_seconds_per_token(load_llm(llm))
    asking_seconds = 1.2 * num_questions * TOKENS_PER_QUESTION * token_seconds
    left = minutes - (time.monotonic() - start + asking_seconds) / 60 - 1  # a minute to merge and to write
    if left < FEWEST_TRAINING_MINUTES:
        raise ValueError(
            f"--minutes {minutes:g} are too few here for --llm {llm}: the {num_questions:,} test questions alone "
            f"take {asking_seconds / 60:.0f}. Give --minutes {math.ceil(minutes - left + FEWEST_TRAINING_MINUTES)} or "
            "more, or a smaller --llm."
        )
    training_minutes = min(MOST_TRAINING_MINUTES, left)
    most_distill_steps = int(30 * training_minutes / (TOKENS_PER_DISTILL_STEP * token_seconds))  # half of the time
    precision = precision_overrides()
    dtype = precision["model.dtype"]
    settings = {"model.llm": llm, "training.seed": seed, "max_minutes": training_minutes} | precision
    with as_file(files("vora.quickstart")) as folder:
        given = [f"{key}={value}" for key, value in settings.items()]
        recipe = load_recipe(folder / "recipe.yaml", [*given, *overrides])
        if recipe.distill_only_steps > most_distill_steps:  # a slow machine would learn no language
            given.append(f"teacher.distill_only_steps={most_distill_steps}")
            recipe = load_recipe(folder / "recipe.yaml", [*given, *overrides])
        console.print(f"[2/5] Training stage 1 in {dtype}, at most {training_minutes:.1f} minutes")
        train_start = time.monotonic()
        try:
            trainer = train(recipe, out / "run", console=console)
        except TooLittleTime as error:
            raise ValueError(
                f"--minutes {minutes:g} are too few here for --llm {llm}, of which {training_minutes:.1f} are left to "
                f"train: give --minutes {math.ceil(minutes + error.minutes - training_minutes)} or more, or a smaller "
                "--llm."
            ) from None
        train_seconds = time.monotonic() - train_start
        console.print("[3/5] Merging vision LoRA into the LLM")
        model, processor = merge_run(out / "run")
    assert isinstance(processor, VoraProcessor)  # a run has a tokenizer
    model = model.to(getattr(torch, dtype))
    use_segmented_sdpa_on_cpu(model, model.device)
    save_merged(model, processor, out / "model", out / "run")

    console.print(f"[4/5] Asking the merged model all {num_questions:,} test questions")
    result = measured((model, processor), samples, out, console) | {
        "num_test_questions": num_questions, "num_samples_seen": trainer.num_samples_seen,
        "num_steps": trainer.state.global_step, "train_seconds": train_seconds, "dtype": dtype, "llm": llm,
        "seed": seed, "num_cpus": os.cpu_count(), "warning": few_answers([samples["train"]]),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT,
    }  # fmt: skip
    console.print("[5/5] Writing the report")
    command = " ".join([f"vora quickstart --llm {llm} --minutes {minutes:g} --seed {seed}", *overrides])
    write_run_card(out / "model", out / "run", evaluation=card_rows(result, command))
    write_report(out, result, samples["test"][:NUM_SHOWN], model, processor)
    result["total_seconds"] = time.monotonic() - start
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(
        f"[bold]{100 * result['accuracy']:.1f} %[/bold] of {num_questions:,} test questions answered exactly; the "
        f"text-only baseline gets {100 * result['text_only_accuracy']:.1f} %. Trained {train_seconds / 60:.1f} "
        f"minutes, {result['total_seconds'] / 60:.1f} in all.\nReport: {out / 'report.html'}\n"
        f'Ask it: vora chat {samples["test"][0].name} -m {out / "model"} -q "what color is the shape?"'
    )
    return result


def measured(loaded: LoadedModel, samples: dict[str, list[Sample]], out: Path, console: Console) -> dict[str, Any]:
    """Exact answers to the test questions, and the text-only baseline; see `vora.eval.tasks.exact`."""
    found = evaluate(
        loaded, "exact", "easy-vqa", out / "evaluation.json", split="test", model_name=out / "model", console=console
    ).metrics
    blank = found["accuracy_with_blank"]["value"] or 0.0
    majority = majority_accuracy(samples["train"], samples["test"])
    kinds = {"yes / no": "accuracy_yes_no", "what": "accuracy_other"}
    return {
        "accuracy": found["accuracy"]["value"],
        "text_only_accuracy": max(blank, majority),
        "blank_image_accuracy": blank,
        "majority_accuracy": majority,
        "accuracy_by_answer": {kind: found[name]["value"] for kind, name in kinds.items() if name in found},
    }


def card_rows(result: dict[str, Any], command: str) -> list[Evaluation]:
    """What the model card says of the test."""
    baseline = "the better of this model with blank images, and the most frequent answer"
    metrics = {
        "exact answers": result["accuracy"],
        f"exact answers of the text-only baseline ({baseline})": result["text_only_accuracy"],
    }
    count = result["num_test_questions"]
    return [("easy-VQA, test questions", name, share, count, command) for name, share in metrics.items()]


@torch.inference_mode()
def forward_seconds_per_token(llm: PreTrainedModel) -> float:
    """How long the bare LLM takes per token on this machine, to plan how long the questions will take."""
    most = min(1000, llm.get_input_embeddings().num_embeddings)
    ids = torch.randint(10, most, (8, 128), device=llm.device)
    seconds = timeit.repeat(lambda: llm.base_model(input_ids=ids, use_cache=False), number=1, repeat=3)
    return min(seconds) / ids.numel()
