"""Images a second of a step that only distills: images in one row against packed sequences with PEFT's own layers.

As recipes/smollm2-135m trains: the patch embedding starts from ViT-Tiny, the teacher; 64 images of 12 x 12 patches,
which make 16 tokens, stand behind 3 tokens of a chat template. Then the share of the measured ceiling of matrix
products, and where the time goes. Both learn from equal samples.

    python benchmarks/distill_step.py --json distill_step.json
"""

from dataclasses import replace
from statistics import median

import contestants
import numpy as np
import torch
from large_step import product_ceiling
from peft.tuners.lora import Linear
from rows import alternate, arguments, compared, parser_of, report, row
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from where_time_goes import profiled, seconds_by_kind

from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, attach_vision_lora
from vora.build.lora_product import LoraLinear
from vora.data.packing import collate_sequences, cut_after_images, images_in_branches, places, share_prefixes
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.model.segmented_sdpa import SEGMENTED_SDPA

SIDE, MERGE, RANK, BEGINNING = 12, 3, 56, 3
PER_SEQUENCE = 4  # images in 80 tokens
SEQUENCE_LENGTH = 80


def objective_of(size, dtype):
    """The objective of distill.yaml, with random weights."""
    teacher = Teacher(contestants.random_vit(size, dtype))
    llm, depth = contestants.random_llm(size, dtype), size.num_blocks
    token = contestants.image_token_id(size)
    vora = VoraForConditionalGeneration.from_llm(llm, teacher=teacher.vit, patch_merge=MERGE, image_token_id=token)
    vora.set_attn_implementation(SEGMENTED_SDPA)
    student = attach_vision_lora(vora, rank=RANK, num_blocks=depth)
    pairs = [*block_pairs(depth, teacher.num_blocks), (depth - 1, SUMMARY)]
    heads = BlockwiseDistillation(pairs, size.llm["hidden_size"], teacher.hidden_size, standardize=True)
    processor = VoraImageProcessor(patch_size=contestants.PATCH, patch_merge=MERGE)
    objective = Objective(student, processor, teacher, heads.to(contestants.device()))
    return contestants.in_float32(objective).train()


def packed_samples(size, count):
    """Sequences of samples cut after their image."""
    rng, token = np.random.default_rng(0), contestants.image_token_id(size)
    ids = np.array([*range(3, 3 + BEGINNING), *[token] * (SIDE // MERGE) ** 2, 7])
    labels, grid = np.where(np.arange(len(ids)) < len(ids) - 1, -100, ids), np.array([[1, SIDE, SIDE]])
    pixels = rng.standard_normal((count, SIDE**2, 3 * contestants.PATCH**2), np.float32)
    samples = [
        cut_after_images(
            share_prefixes([dict(input_ids=ids, labels=labels, pixel_values=p, image_grid_thw=grid)]), token
        )
        for p in pixels
    ]
    return [samples[start : start + PER_SEQUENCE] for start in range(0, count, PER_SEQUENCE)]


class Step:
    """An optimizer step on one batch."""

    def __init__(self, objective, batch, dtype):
        self.objective, self.batch, self.in_bf16 = objective, contestants.on_device(batch), dtype == torch.bfloat16
        self.trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

    def __call__(self):
        with torch.autocast(contestants.device().type, torch.bfloat16, enabled=self.in_bf16):
            loss = self.objective(**self.batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def measured(args):
    """Rows."""
    dtype, size = (
        getattr(torch, args.dtype),
        replace(contestants.SIZES[args.size], image_size=SIDE * contestants.PATCH),
    )
    sequences, token = packed_samples(size, args.images), contestants.image_token_id(size)
    packed = collate_sequences(sequences, SEQUENCE_LENGTH, 0)
    batches = {"packed": packed | places(packed, token, MERGE)}
    batches["one row"] = images_in_branches(sequences, SEQUENCE_LENGTH, token, 0)
    steps = {name: Step(objective_of(size, dtype), batch, dtype) for name, batch in batches.items()}
    for layer in steps["packed"].objective.modules():
        if isinstance(layer, LoraLinear):
            layer.__class__ = Linear
    what = f"distill-only step, {args.size}, {args.images} images, {args.dtype}"
    first = {name: step() for name, step in steps.items()}
    yield row(f"{what}: first loss", first["one row"], first["packed"], "1 - cos")
    times = alternate(steps, args.rounds)
    options = {"ours": "one row", "baseline": "packed"}
    yield compared(what, times, "images/s", lambda seconds: args.images / seconds, **options)
    with FlopCounterMode(display=False) as counter:
        steps["one row"]()
    reached = counter.get_total_flops() / median(times["one row"])
    yield row(f"{what}: of matrix products", reached, product_ceiling(args.ceiling_side, dtype), "FLOP/s")
    kinds = {name: seconds_by_kind(profiled(step)) for name, step in steps.items()}
    for kind, seconds in kinds["one row"].items():
        yield row(f"{what}: {kind}", 1000 * seconds, 1000 * kinds["packed"][kind], "ms")


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=contestants.SIZES, default="smollm2-135m")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ceiling-side", type=int, default=2048)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=contestants.default_dtype())
    args = arguments(parser)
    report(measured(args), args.json)


if __name__ == "__main__":
    main()
