"""The models, images and training steps that the benchmarks set against each other.

All weights are random, from configurations: nothing is fetched. Both contestants get the same LLM, the same teacher,
the same images and the same tokens of text.
"""

import json
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from original import IMAGE, OriginalVora, collate, square_frame
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TrainingArguments

from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, attach_vision_lora
from vora.data.packing import collate_sequences, next_sequence, places, share_prefixes
from vora.data.stream import WAITING
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.model.segmented_sdpa import SEGMENTED_SDPA
from vora.train.plan.meta_model import SHAPES
from vora.train.run import compile_blocks
from vora.train.throughput import cpu_dtype
from vora.train.trainer import ON_HOST

PATCH = 14
# width and height of what people photograph and download
IMAGE_SIZES = ((640, 480), (480, 640), (500, 375), (1280, 720), (600, 600), (375, 500), (1024, 683), (720, 1280))
ANSWER_TOKENS = (20, 120)  # a caption
QUESTION_TOKENS = (8, 24)
NUM_EARLIER = 16  # sequences of a stream before those that are measured


@dataclass(frozen=True)
class Size:
    """Shapes of an LLM and its teacher, and what of the LLM learns."""

    llm: dict
    teacher: dict
    image_size: int
    rank: int
    num_blocks: int


def fields_of(name):
    """The fields of a configuration that vora ships, without what says how it is loaded."""
    fields = json.loads((SHAPES / name / "config.json").read_text())
    return {key: value for key, value in fields.items() if key not in ("architectures", "torch_dtype")}


SIZES = {
    "toy": Size(
        llm={
            "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "pad_token_id": 2,
        },
        teacher={
            "model_type": "vit", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4,
        },
        image_size=56, rank=4, num_blocks=2,
    ),
    "smollm2-135m": Size(  # with ViT-Tiny
        llm=fields_of("HuggingFaceTB/SmolLM2-135M-Instruct"),
        teacher={
            "model_type": "vit", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 3,
        },
        image_size=224, rank=64, num_blocks=12,
    ),
    "qwen2.5-7b": Size(
        llm=fields_of("Qwen/Qwen2.5-7B-Instruct") | {"pad_token_id": 0},
        teacher=fields_of("apple/aimv2-huge-patch14-448"), image_size=448, rank=1024, num_blocks=24,
    ),
}  # fmt: skip


def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype():
    """bfloat16 on a GPU and where the processor multiplies it faster, else float32."""
    return "bfloat16" if torch.cuda.is_available() else cpu_dtype()


def default_attention():
    """What `vora train` and `vora.load_model` choose: see `vora.model.segmented_sdpa.use_segmented_sdpa_on_cpu`."""
    return "sdpa" if torch.cuda.is_available() else SEGMENTED_SDPA


def add_precisions(parser):
    """What both contestants compute in, and the attention of ours."""
    plain = "bfloat16" if torch.cuda.is_available() else "float32"
    for name, default in (("--our-dtype", default_dtype()), ("--baseline-dtype", plain)):
        parser.add_argument(name, choices=("float32", "bfloat16"), default=default)
    parser.add_argument("--attn", default=default_attention(), help="attention of ours in training")


def add_steps(parser, size, scale, sequence_length, sequences, rounds):
    """What both contestants train on in a round, and the models' size; the arguments are defaults."""
    parser.add_argument("--size", choices=SIZES, default=size)
    parser.add_argument("--scale", choices=("pixels", "tokens"), default=scale, help="what images have alike")
    parser.add_argument("--sequence-length", type=int, default=sequence_length, help="of a packed sequence of ours")
    parser.add_argument("--sequences", type=int, default=sequences, help="packed sequences in a round")
    parser.add_argument("--sequences-per-batch", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="samples in a step of the original")
    parser.add_argument("--rounds", type=int, default=rounds)


def random_llm(size, dtype=torch.float32):
    """The causal LM of a size."""
    return _random(AutoModelForCausalLM, size.llm, dtype, seed=0)


def random_vit(size, dtype=torch.float32):
    """The teacher's network of a size."""
    return _random(AutoModel, size.teacher | {"patch_size": PATCH, "image_size": size.image_size}, dtype, seed=1)


def _random(auto, fields, dtype, seed):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**fields)
    with device():
        return auto.from_config(config, dtype=dtype).eval()


def image_token_id(size):
    """The last token of the vocabulary, which no text here holds."""
    return size.llm["vocab_size"] - 1


def random_vora(size, dtype=torch.float32, attn="sdpa"):
    """A VoRA model of a size without LoRA, as it is after the merge."""
    return with_sight(random_llm(size, dtype), size, attn)


def with_sight(llm, size, attn, patch_merge=1):
    """A VoRA model around an LLM of a size."""
    model = VoraForConditionalGeneration.from_llm(
        llm, patch_size=PATCH, image_size=size.image_size, patch_merge=patch_merge, image_token_id=image_token_id(size)
    )
    model.set_attn_implementation(attn)
    used = model.model.language_model.config._attn_implementation
    if used != attn:
        raise ValueError(f"{attn} was asked for, but the LLM uses {used}: these figures would be of that.")
    return model


def build_ours(size, dtype=torch.float32, attn="sdpa", pairs=None, center=True):
    """The `Objective` of stage 1: LoRA, patch embedding and heads in float32, the rest in `dtype`."""
    teacher, vora = Teacher(random_vit(size, dtype)), random_vora(size, dtype, attn)
    with device():  # billions of values are drawn faster there
        student = attach_vision_lora(vora, rank=size.rank, num_blocks=size.num_blocks)
    pairs = block_pairs(size.num_blocks, teacher.num_blocks) if pairs is None else pairs
    distillation = BlockwiseDistillation(pairs, size.llm["hidden_size"], teacher.hidden_size, center).to(device())
    objective = Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation)
    return in_float32(objective).train()


def build_original(size, dtype=torch.float32):
    """The original of the same size."""
    vit, llm = random_vit(size, dtype), random_llm(size, dtype)
    has_cls = any("cls_token" in name for name, _ in vit.named_parameters())
    shape = {"patch_size": PATCH, "image_size": size.image_size, "rank": size.rank, "num_blocks": size.num_blocks}
    with device():
        model = OriginalVora(llm, width=768, teacher=vit, skip_cls=has_cls, **shape)
    in_float32(model.to(device())).train()
    model.aux_vision.eval()
    return model


def in_float32(model):
    """What trains is kept in float32: updates of 1e-4 vanish in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


@torch.no_grad()
def share_weights(original, objective):
    """Give both the same LoRA, patch embedding and heads, none zero; biases that ours lacks become zero.

    LLM and teacher are the same already, made from the same seeds. Level i of the original and the pair (i - 1, i - 1)
    of ours compare the same states, so they share a head.
    """
    torch.manual_seed(2)
    blocks, embedding = objective.vora.model.blocks, objective.vora.model.patch_embedding
    for theirs, ours in zip(original.llm.model.layers[: original.num_blocks], blocks):
        for target in original.targets:
            layer, copied = theirs.get_submodule(target), ours.get_submodule(target)
            nn.init.normal_(layer.lora_B.weight, std=0.02)
            copied.lora_A["default"].weight.copy_(layer.lora_A.weight)
            copied.lora_B["default"].weight.copy_(layer.lora_B.weight)
            if layer.bias.requires_grad:
                layer.bias.zero_()
    vision = original.vision_embedding
    nn.init.normal_(vision.pos_embed, std=0.02)
    embedding = getattr(embedding, "modules_to_save", {"default": embedding})["default"]
    embedding.patch.weight.copy_(vision.patchifier.proj.weight.flatten(1))
    embedding.patch.bias.copy_(vision.patchifier.proj.bias)
    embedding.norm.weight.copy_(vision.patchifier.norm.weight)
    embedding.position.copy_(vision.pos_embed[0])
    embedding.projection.weight.copy_(vision.out_proj.weight)
    for name, head in objective.distillation.heads.items():
        norm, linear = getattr(original.aux_vision, f"aux_layer_{int(name) + 1}")
        head[0].weight.copy_(norm.weight)
        head[1].weight.copy_(linear.weight)
        head[1].bias.zero_()


@dataclass
class Sample:
    """An image with one or more turns: (ids of a question, ids of its answer)."""

    image: Image.Image
    turns: list


def endless_samples(size, answer_tokens=ANSWER_TOKENS, num_turns=1):
    """Smooth noise in the usual sizes, with text tokens drawn at random; the same for all contestants."""
    rng = np.random.default_rng(0)

    def text(span):
        return rng.integers(3, image_token_id(size), rng.integers(*span)).tolist()

    for pixels in cycle(IMAGE_SIZES):
        image = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize(pixels, Image.Resampling.BICUBIC)
        yield Sample(image, [(text(QUESTION_TOKENS), text(answer_tokens)) for _ in range(num_turns)])


def squared(samples, image_size):
    """The same samples with images that are squares already, black bars included."""
    pixels = [(square_frame(sample.image, image_size) + 1) * 127.5 for sample in samples]
    images = [Image.fromarray(one.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()) for one in pixels]
    return [Sample(image, sample.turns) for image, sample in zip(images, samples)]


def original_batches(samples, size, batch_size):
    """Batches as the original makes them: a row for each question, with its image on a black square, padded to the
    longest row."""
    rows = [
        ([IMAGE, *question, *answer], [-100] * (1 + len(question)) + answer, frame)
        for sample in samples
        for frame in [square_frame(sample.image, size.image_size)]
        for question, answer in sample.turns
    ]
    pad, starts = size.llm["pad_token_id"], range(0, len(rows), batch_size)
    return [on_device(collate(rows[start : start + batch_size], pad)) for start in starts]


def our_sample(sample, size, same_scale=True):
    """A sample of `share_prefixes`, in which all its turns share the image.

    Args:
        same_scale: the image is as large as inside the original's square, only without the bars. Otherwise it
            fills as many tokens as the square has.
    """
    image, budget = sample.image, (size.image_size // PATCH) ** 2
    if same_scale:
        scale = size.image_size / max(image.size)
        image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
    processor = VoraImageProcessor(patch_size=PATCH, max_image_tokens=budget, min_image_tokens=1)
    images = processor([image], return_tensors="np")
    tokens = [image_token_id(size)] * int(images["image_grid_thw"].prod())
    conversations = []
    for question, answer in sample.turns:
        ids = np.array([*tokens, *question, *answer])
        labels = np.where(np.arange(len(ids)) < len(ids) - len(answer), -100, ids)
        conversations.append({"input_ids": ids, "labels": labels, **images})
    return share_prefixes(conversations)


def full_sequences(size, sequence_length, num_sequences, same_scale=True, answer_tokens=ANSWER_TOKENS, num_turns=1):
    """As many samples as some packed sequences of a stream hold.

    The stream's first sequences are its fullest, since it may choose among samples of every length; these come later.

    Returns:
        (list of `Sample`, list of `num_sequences` lists of the same samples for `collate_sequences`).
    """
    stream, waiting, sequences = endless_samples(size, answer_tokens, num_turns), [], []
    for _ in range(NUM_EARLIER + num_sequences):
        waiting += [(one, our_sample(one, size, same_scale)) for one in islice(stream, WAITING - len(waiting))]
        chosen = next_sequence([len(ours["input_ids"]) for _, ours in waiting], sequence_length)
        sequences.append([waiting[place] for place in chosen])
        waiting = [pair for place, pair in enumerate(waiting) if place not in chosen]
    taken = sequences[NUM_EARLIER:]
    samples = [sample for sequence in taken for sample, _ in sequence]
    return samples, [[ours for _, ours in sequence] for sequence in taken]


def batches_of_sequences(sequences, size, sequence_length, sequences_per_batch):
    pad = size.llm["pad_token_id"]
    starts = range(0, len(sequences), sequences_per_batch)
    batches = [collate_sequences(sequences[i : i + sequences_per_batch], sequence_length, pad) for i in starts]
    return [on_device(batch | places(batch, image_token_id(size))) for batch in batches]


def on_device(batch):
    """As the trainer: what only the host reads stays there."""
    return {name: value if name in ON_HOST else value.to(device()) for name, value in batch.items()}


class Contestant:
    """A model, "ours" or "original", with its optimizer and batches; called, it trains on all of them once."""

    def __init__(self, variant, size, batches, dtype, attn, compiled=False):
        is_ours = variant == "ours"
        self.model = build_ours(size, dtype, attn) if is_ours else build_original(size, dtype)
        if compiled:
            compile_blocks(self.model, TrainingArguments(torch_compile=True, use_cpu=device().type == "cpu"))
        self.llm = self.model.vora.model.language_model if is_ours else self.model.llm
        self.batches, self.dtype = batches, dtype
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=is_ours)

    def __call__(self):
        for batch in self.batches:
            self.step(batch)

    def step(self, batch):
        """One optimizer step: forward, backward, clip, update."""
        with torch.autocast(device().type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
