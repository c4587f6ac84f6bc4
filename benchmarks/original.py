"""The original VoRA in our own words: the baseline of the benchmarks, and the oracle of tests.

What Hon-Wong/VoRA computes at commit f138756, in its order and with its waste: square images, a dense float mask made
token by token, logits of every place, every hidden state, a number fetched for each loss. Checked against figures of
that code in `tests/test_original.py`; its parameter names are those of its checkpoints.

It differs on purpose in three points: each row has one image, which does not run on into the next row's mask, and only
LLMs with `llm.model.layers` are taken.

Dims: B rows and images, S ids of a row, T tokens of a row once the image stands in it, K patches of an image, D = LLM
width, D_v = width of the patch embedding, V = vocabulary.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

IMAGE = -200  # stands for a whole image in input_ids
MASKED = -100
TARGETS = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("up", "gate", "down"))]


class LoraLinear(nn.Linear):
    """W x + bias + B A x, scale 1. It has a bias, random at first, also where the layer that it replaces had none.

    Args:
        rank: None once merged.
    """

    def __init__(self, replaced, rank):
        super().__init__(replaced.in_features, replaced.out_features)
        self.weight = replaced.weight  # the LLM's own, frozen
        if replaced.bias is not None:
            self.bias = replaced.bias
        self.rank = rank
        if rank is not None:
            self.lora_A = nn.Linear(self.in_features, rank, bias=False)
            self.lora_B = nn.Linear(rank, self.out_features, bias=False)
            nn.init.kaiming_uniform_(self.lora_A.weight, a=5**0.5)
            nn.init.zeros_(self.lora_B.weight)

    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs if self.rank is None else outputs + self.lora_B(self.lora_A(inputs))


class Patchifier(nn.Module):
    """float[B, 3, H, W] to normed patches float[B, K, D_v]."""

    def __init__(self, width, patch_size, eps):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.norm = nn.RMSNorm(width, eps=eps)

    def forward(self, frames):
        return self.norm(self.proj(frames).flatten(2).transpose(1, 2))


class VisionEmbedding(nn.Module):
    """float[B, 3, H, W], of as many patches as the table of positions has, to image tokens float[B, K, D]."""

    def __init__(self, width, hidden_size, patch_size, image_size, eps):
        super().__init__()
        self.patchifier = Patchifier(width, patch_size, eps)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, width))
        self.out_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, frames):
        return self.out_proj(self.patchifier(frames) + self.pos_embed)


class AuxVision(nn.Module):
    """The teacher and one head per level: level i likens what enters student block i to the teacher's state i."""

    def __init__(self, teacher, hidden_size, skip_cls=True):
        super().__init__()
        config = teacher.config
        self.aux_model = teacher.requires_grad_(False).eval()
        if config.model_type == "clip_vision_model":  # in checkpoints its names have one room more
            self.aux_model = nn.Module()
            self.aux_model.vision_model = teacher
        self.num_levels, self.skip_cls = config.num_hidden_layers, skip_cls
        for level in range(self.num_levels):
            head = nn.Linear(hidden_size, config.hidden_size, bias=False)
            self.add_module(f"aux_layer_{level}", nn.Sequential(nn.RMSNorm(hidden_size, eps=1e-5), head))

    @property
    def teacher(self):
        return getattr(self.aux_model, "vision_model", self.aux_model)

    def forward(self, frames, hidden_states, is_image):
        """The loss of each level, list of float[]: 1 - cosine, mean over image tokens."""
        taught = self.teacher(frames, output_hidden_states=True).hidden_states
        losses = []
        for level in range(self.num_levels):
            said = getattr(self, f"aux_layer_{level}")(hidden_states[level][is_image])
            target = taught[level][:, int(self.skip_cls) :].reshape(said.shape)
            losses.append((1 - F.cosine_similarity(target, said, dim=1)).mean())
        return losses


class OriginalVora(nn.Module):
    """The original model.

    Args:
        llm: a causal LM of transformers with `llm.model.layers`; it is frozen and altered.
        width: D_v.
        rank: of the low-rank pairs, which the first `num_blocks` blocks have; None for a merged model.
        targets: paths of linear layers inside a block.
        teacher: a plain ViT of transformers, or None.
    """

    def __init__(
        self, llm, *, width, patch_size, image_size, rank, num_blocks, targets=TARGETS, teacher=None, skip_cls=True
    ):
        super().__init__()
        self.llm = llm.requires_grad_(False)
        self.rank, self.num_blocks, self.targets = rank, num_blocks, list(targets)
        self.patch_size, self.image_size = patch_size, image_size
        for block in llm.model.layers[:num_blocks]:
            for target in self.targets:
                block.set_submodule(target, LoraLinear(block.get_submodule(target), rank))
        hidden_size = llm.config.hidden_size
        self.vision_embedding = VisionEmbedding(width, hidden_size, patch_size, image_size, llm.config.rms_norm_eps)
        self.aux_vision = None if teacher is None else AuxVision(teacher, hidden_size, skip_cls)

    @property
    def lora_layers(self):
        return [module for module in self.llm.modules() if isinstance(module, LoraLinear)]

    def forward(self, input_ids, attention_mask, frames, labels=None):
        """Logits, and losses if there are labels.

        Args:
            input_ids: int[B, S], -200 once in each row.
            attention_mask: int[B, S], 0 at padding.
            frames: float[B, 3, H, W].
            labels: int[B, S], -100 where masked.

        Returns:
            dict: `logits` float[B, T, V]; with labels also `loss` and `metrics`, {name: number} as the original logs
            them: llm_loss, loss_aux_layer_i, total_loss.
        """
        embeds, valid, targets, is_image = self.insert_images(input_ids, attention_mask, frames, labels)
        outputs = self.llm(
            inputs_embeds=embeds,
            attention_mask=dense_mask(valid, is_image, embeds.dtype),
            labels=targets,
            output_hidden_states=True,
        )
        if labels is None:
            return {"logits": outputs.logits}
        loss, metrics = outputs.loss, {"llm_loss": outputs.loss.item()}
        if self.aux_vision is not None:
            levels = self.aux_vision(frames, outputs.hidden_states, is_image)
            metrics |= {f"loss_aux_layer_{level}": value.item() for level, value in enumerate(levels)}
            loss = loss + sum(levels) / len(levels)
        return {"logits": outputs.logits, "loss": loss, "metrics": metrics | {"total_loss": loss.item()}}

    def insert_images(self, input_ids, attention_mask, frames, labels=None):
        """Rows in which the image has become its tokens.

        Returns:
            (float[B, T, D], bool[B, T] True at tokens, int[B, T] labels or None, bool[B, T] True at image tokens).
        """
        images, embedding = self.vision_embedding(frames).to(self.llm.dtype), self.llm.get_input_embeddings()
        rows = []
        wanted = torch.full_like(input_ids, MASKED) if labels is None else labels
        for ids, seen, answer, image in zip(input_ids, attention_mask == 1, wanted, images):
            place, here = (ids == IMAGE).nonzero().item(), seen.new_ones(len(image))
            parts = [
                (embedding(ids[:place]), image, embedding(ids[place + 1 :])),
                (seen[:place], here, seen[place + 1 :]),
                (answer[:place], ids.new_full((len(image),), MASKED), answer[place + 1 :]),
                (here.new_zeros(place), here, here.new_zeros(len(ids) - place - 1)),
            ]
            rows.append([torch.cat(part) for part in parts])
        embeds, valid, targets, is_image = (torch.stack(column) for column in zip(*rows))
        return embeds, valid, None if labels is None else targets, is_image

    @torch.no_grad()
    def merge(self):
        """Fold the pairs into the weights and drop the teacher; the biases stay. In place; returns the model."""
        for layer in self.lora_layers:
            layer.weight = nn.Parameter(layer.weight + layer.lora_B.weight @ layer.lora_A.weight)
            layer.rank = None
            del layer.lora_A, layer.lora_B
        self.rank, self.aux_vision = None, None
        return self

    def config_fields(self):
        """What its config.json holds: the LLM's fields laid flat in the manner of transformers 4, and VoRA's own."""
        fields = self.llm.config.to_dict()
        rope = fields.pop("rope_parameters", None) or {}
        fields |= {"rope_theta": rope.get("rope_theta"), "rope_scaling": None}
        if rope.get("rope_type", "default") != "default":
            fields["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        fields.pop("dtype", None)
        fields.pop("layer_types", None)
        return fields | {
            "architectures": [type(self.llm).__name__],
            "model_type": "vora",
            "torch_dtype": str(self.llm.dtype).removeprefix("torch."),
            "transformers_version": "4.50.3",
            "llm": "llm",
            "aux_vision": "" if self.aux_vision is None else "teacher",
            "skip_aux_cls": True if self.aux_vision is None else self.aux_vision.skip_cls,
            "reuse_aux_vision_embedding_layers": "",
            "lora": {
                "layers": self.num_blocks,
                "r": -1 if self.rank is None else self.rank,
                "target_modules": self.targets,
            },
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "vision_embedding": "AIMv2Embedding",
            "vision_embedding_intermediate_size": self.vision_embedding.pos_embed.shape[-1],
            "vision_attention_mask": "bidirectional",
        }


def dense_mask(valid, is_image, dtype):
    """float[B, 1, T, T] to add to attention scores, 0 where a token is seen; made place by place.

    Args:
        valid: bool[B, T], False at padding.
        is_image: bool[B, T], True at image tokens; neighbours are taken for one image.
    """
    num_rows, length = valid.shape
    lowest = torch.finfo(dtype).min
    mask = torch.full((length, length), lowest, dtype=dtype, device=valid.device).triu(1)
    mask = mask.expand(num_rows, 1, -1, -1).masked_fill(~valid[:, None, None, :], lowest)
    within = torch.zeros_like(mask)
    for row in range(num_rows):
        begin = None
        for place in range(length + 1):
            inside = place < length and bool(is_image[row, place])  # on a GPU, each of these waits for it
            if inside and begin is None:
                begin = place
            if not inside and begin is not None:
                within[row, 0, begin:place, begin:place] = 1
                begin = None
    return mask.masked_fill(within.bool(), 0)


def square_frame(image, image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
    """A PIL image centred on a black square, resized and normalised: float[3, image_size, image_size]."""
    side = max(image.size)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    canvas = canvas.resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1) / 255
    return (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]


def collate(samples, pad_token_id=0):
    """Samples to a batch of `OriginalVora.forward`, padded on the right.

    Args:
        samples: list of (input_ids list[int] with one -200, labels list[int], frame float[3, H, W]).
    """
    longest = max(len(ids) for ids, _, _ in samples)

    def padded(rows, value):
        return torch.tensor([list(one) + [value] * (longest - len(one)) for one in rows])

    ids, labels, frames = zip(*samples)
    return {
        "input_ids": padded(ids, pad_token_id),
        "attention_mask": padded([[1] * len(one) for one in ids], 0),
        "labels": padded(labels, MASKED),
        "frames": torch.stack(frames),
    }


def llm_of_fields(fields):
    """The bare LLM, with random weights, that the flat fields of a config.json describe."""
    family = {name: key for key, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if isinstance(name, str)}
    kind = family[fields["architectures"][0]]
    known = (AutoConfig.for_model(kind).to_dict().keys() | {"rope_theta", "rope_scaling"}) - {"model_type", "dtype"}
    config = AutoConfig.for_model(kind, **{name: value for name, value in fields.items() if name in known})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_original(folder):
    """An `OriginalVora` from a checkpoint in its layout; the teacher's configuration lies beside the folder."""
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text())
    teacher = None
    if fields["aux_vision"]:
        teacher = AutoModel.from_config(AutoConfig.from_pretrained(folder.parent / fields["aux_vision"]))
    model = OriginalVora(
        llm_of_fields(fields),
        width=fields["vision_embedding_intermediate_size"],
        patch_size=fields["patch_size"],
        image_size=fields["image_size"],
        rank=fields["lora"]["r"] if fields["lora"]["r"] > 0 else None,
        num_blocks=fields["lora"]["layers"],
        targets=fields["lora"]["target_modules"],
        teacher=teacher,
        skip_cls=fields["skip_aux_cls"],
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def save_original(model, folder):
    """Write a checkpoint in the original's layout, and beside the folder `llm/config.json` and `teacher/`.

    The output layer of an LLM with tied embeddings is left out, as transformers does.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config_fields(), indent=1))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.llm.config.tie_word_embeddings:
        del weights["llm.lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    model.llm.config.save_pretrained(folder.parent / "llm")
    if model.aux_vision is not None:
        model.aux_vision.teacher.save_pretrained(folder.parent / "teacher")
