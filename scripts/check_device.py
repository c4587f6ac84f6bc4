"""Whether all tensors would be on one GPU, and where the host would wait for it: found without a GPU.

Training steps (forward passes with teacher and losses), a step that only distills, prefill and decoding by hand,
`generate`, what evaluation does, and the road of chat and server run at toy size on fake `cuda` tensors
(`fake_gpu.py`). It needs a torch with CUDA, and no GPU: `pip install torch` on Linux brings one. Backward passes and
optimizers want a real context; `tests/train/test_blocks.py` runs the former on torch's `meta` device.

    python scripts/check_device.py --json check_device.json
"""

import argparse
import json
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from fake_gpu import GPU, FakeGpu, lacks  # noqa: E402
from packed import questions, sample  # noqa: E402
from PIL import Image  # noqa: E402
from tiny import IMAGE, PATCH, SHAPE, save_tiny_llm, text, tiny_llm, tiny_vora, train_a_little  # noqa: E402
from tiny_teachers import tiny_vit  # noqa: E402

import vora.serve.engine  # noqa: E402
from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, attach_vision_lora  # noqa: E402
from vora.build.from_llm import processor_from_llm  # noqa: E402
from vora.data.packing import (  # noqa: E402
    collate_sequences,
    cut_after_images,
    label_weights,
    places,
    places_of_text,
    share_prefixes,
)
from vora.data.schema import Sample  # noqa: E402
from vora.data.turns import question_and_answer  # noqa: E402
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation  # noqa: E402
from vora.distill.objective import Objective  # noqa: E402
from vora.eval.rows import Example  # noqa: E402
from vora.eval.scoring.candidates import answer_ids, candidate_scores  # noqa: E402
from vora.eval.scoring.generate import free_answers  # noqa: E402
from vora.eval.scoring.prompt import prompt_of  # noqa: E402
from vora.eval.scoring.teacher_forced import score_answers  # noqa: E402
from vora.model.modeling_vora import CACHE  # noqa: E402
from vora.train.trainer import ON_HOST  # noqa: E402

ATTENTIONS, DTYPES = ("sdpa", "flex_attention"), ("float32", "bfloat16")
LENGTH = 64  # of packed sequences
NEVER = ("training step", "step that only distills", "prefill and decoding")  # roads on which the host never waits
Road = Callable[[FakeGpu], None]


def training_road(attn: str, dtype: str, distill_only: bool) -> Road:
    """Two steps: the first brings the teacher, and numbers that stay."""
    llm = tiny_llm("llama")
    student = attach_vision_lora(tiny_vora(llm), rank=2, num_blocks=2)
    train_a_little(student)
    student.get_base_model().set_attn_implementation(attn)
    teacher = Teacher(tiny_vit("vit"))
    pairs = [(0, 0), (2, 1), (2, SUMMARY)]
    distillation = BlockwiseDistillation(pairs, SHAPE["hidden_size"], teacher.hidden_size, standardize=True)
    objective = Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation, text_kl_weight=1.0)
    sequences = [
        [share_prefixes(questions(0))],
        [share_prefixes(questions(1, 1))],
        [share_prefixes([sample(*text(9))])],
    ]
    if distill_only:
        sequences = [[cut_after_images(one, IMAGE) for one in row] for row in sequences[:2]] + sequences[2:]
        sequences[2][0]["targets"][:] = -100
    batch: Any = collate_sequences(sequences, LENGTH, pad_token_id=0)
    batch |= places(batch, IMAGE) | places_of_text(sequences, LENGTH)
    if not distill_only:
        batch["label_weights"] = label_weights(batch, 1.0)

    def run(gpu: FakeGpu) -> None:
        objective.train().to(GPU)
        moved = {name: t if name in ON_HOST else t.to(GPU, non_blocking=True) for name, t in batch.items()}
        for step in range(2):
            gpu.waits.clear()
            # flex attention makes its backward pass beforehand, for which there is no context
            with (
                torch.set_grad_enabled(attn != "flex_attention"),
                torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"),
            ):
                losses = objective(**moved)
        assert ("lm_loss" in losses) == (not distill_only) and {"distill_loss", "text_loss"} <= losses.keys()

    return run


def model_of(attn: str, dtype: str, folder: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    llm = save_tiny_llm(folder)
    model = VoraForConditionalGeneration.from_llm(llm, patch_size=PATCH, image_size=3 * PATCH)
    model.set_attn_implementation(attn)
    return model.to(getattr(torch, dtype)).eval(), processor_from_llm(llm, patch_size=PATCH)


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8))


def by_hand_road(model: Any, processor: Any) -> Road:
    """A prompt whose images' numbers the host has found, and tokens after it."""
    content = [{"type": "image", "image": image(0)}, {"type": "text", "text": "what?"}]
    inputs = dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    )
    numbers = places({"targets": inputs["input_ids"], **inputs}, model.config.image_token_id)["image_numbers"]  # type: ignore[typeddict-item]

    inputs.pop("attention_mask")  # nothing is padded, and to see that transformers would ask the GPU

    @torch.inference_mode()
    def run(gpu: FakeGpu) -> None:
        model.to(GPU)
        grids = inputs["image_grid_thw"]
        given = {name: tensor.to(GPU) for name, tensor in (inputs | {"image_numbers": numbers}).items()}
        gpu.waits.clear()
        output = model(**given | {"image_grid_thw": grids}, use_cache=True, logits_to_keep=1)
        for _ in range(2):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, **{CACHE: getattr(output, CACHE)}, use_cache=True)

    return run


def generate_road(model: Any, processor: Any) -> Road:
    content = [{"type": "image", "image": image(0)}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )

    def run(gpu: FakeGpu) -> None:
        model.to(GPU)
        given = inputs.to(GPU)
        gpu.waits.clear()
        model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    return run


def evaluation_road(model: Any, processor: Any) -> Road:
    """Free answers, candidates behind prompts that are read once, and given answers in one pass."""
    examples = [Example(f"{n}", "what?", ["red"], lambda n=n: [image(n)], n) for n in (0, 1)]
    prompts = [prompt_of(processor, example) for example in examples]
    for prompt in prompts:
        prompt.answers = answer_ids(processor, prompt, ["red", "red circle", "blue square"])
    turns = [question_and_answer("what?", answer) for answer in ("red", "blue circle")]
    records = [(n, Sample(f"{n}", [image(n)], turns)) for n in (0, 1)]

    def run(gpu: FakeGpu) -> None:
        model.to(GPU)
        gpu.waits.clear()
        free_answers(model, processor, prompts, 4)
        candidate_scores(model, prompts)
        list(score_answers(model, processor, records))

    return run


def engine_road(model: Any, processor: Any) -> Road:
    content = [{"type": "image", "image": image(0)}, {"type": "text", "text": "what?"}]

    def run(gpu: FakeGpu) -> None:
        model.to(GPU)
        gpu.waits.clear()

        def present_too(target: Callable[[], None], **kwargs: Any) -> threading.Thread:
            def work() -> None:  # modes are a thread's own
                with gpu:
                    target()

            return threading.Thread(target=work, **kwargs)

        vora.serve.engine.Thread = present_too  # type: ignore[attr-defined,assignment]
        engine = vora.serve.engine.Engine(model, processor)
        list(engine.submit([{"role": "user", "content": content}], max_new_tokens=4))

    return run


def roads(attn: str, dtype: str, folder: str) -> dict[str, Road]:
    asked = {
        "prefill and decoding": by_hand_road,
        "generate": generate_road,
        "evaluation": evaluation_road,
        "chat and server": engine_road,
    }
    return {
        "training step": training_road(attn, dtype, distill_only=False),
        "step that only distills": training_road(attn, dtype, distill_only=True),
        **{name: road(*model_of(attn, dtype, folder)) for name, road in asked.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS)
    parser.add_argument("--json", type=Path, help="write what was found here")
    args = parser.parse_args()
    if why := lacks():
        raise SystemExit(f"Nothing was checked: {why}. Install one with CUDA, which needs no GPU, and run this again.")
    warnings.filterwarnings("ignore")
    torch.compiler.set_stance("force_eager")  # compiled code is for GPUs that are there
    rows, failed = [], False
    for attn in args.attention:
        for dtype in DTYPES:
            with TemporaryDirectory() as folder:
                for name, road in roads(attn, dtype, folder).items():
                    gpu = FakeGpu()
                    with gpu.present():
                        road(gpu)
                    wrong = name in NEVER and bool(gpu.waits)
                    failed |= wrong
                    print(f"{name}, {attn}, {dtype}: {sum(gpu.waits.values())} waits{' WRONG' if wrong else ''}")
                    for (what, ours, line), count in gpu.waits.items():
                        rows.append({"road": name, "attention": attn, "dtype": dtype, "what": what, "ours": ours,
                                     "line": line, "count": count})  # fmt: skip
                        print(f"  {count:3} {what:25} {ours or '-':50} {line if line != ours else ''}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
