"""Tiny random models of many families, a tiny tokenizer, and prompts for them."""

import copy
import os
import subprocess
import sys
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, ViTConfig, ViTModel

from vora import VoraForConditionalGeneration

IMAGE = 5  # image token of the models built here
PATCH, GRID = 4, 3  # side of a patch in pixels; side of the learned grid in patches

SHAPE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WINDOW = {"sliding_window": 6}  # smaller than an image and than every row
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, **WINDOW}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": WINDOW,
    "gemma2": {"final_logit_softcapping": 2.0, **GEMMA},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **GEMMA},
    "phi3": {"tie_word_embeddings": False},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "gpt_neox": {},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.5},
    "olmo2": {},
    "phi": {"tie_word_embeddings": False},  # its output layer has a bias
    "gpt2": {"n_inner": 48},
}


@cache
def _llm(family):
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llm = AutoModelForCausalLM.from_config(config)
        for name, parameter in llm.named_parameters():
            if parameter.dim() == 1:  # biases and norms, which start at 0 and 1, so that tests see them
                parameter.data += 0.1 * torch.randn_like(parameter)
    return llm.eval()


def tiny_llm(family, **changes):
    """A fresh copy of a tiny random causal LM; `changes` are of its configuration."""
    llm = copy.deepcopy(_llm(family))
    llm.config.update(changes)
    return llm


def tiny_vora(llm, **options):
    """Fresh sight for an LLM (or the family of that name), seeded; `options` are of `from_llm`."""
    llm = tiny_llm(llm) if isinstance(llm, str) else llm
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return VoraForConditionalGeneration.from_llm(
            llm, patch_size=PATCH, image_size=PATCH * GRID, image_token_id=IMAGE, **options
        )


def save_tiny_vit(folder, num_hidden_layers=2):
    """A ViT for images of 16 x 16 pixels, saved as on the hub; returns the folder."""
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(1)
    config = ViTConfig(**shape, num_hidden_layers=num_hidden_layers)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return str(folder)


def command_line(*arguments, code="from vora.cli import main; main()", **kwargs):
    """`vora ARGUMENTS` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "300"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, **kwargs)


def text(length, seed=0):
    """Ids of words, never a special token or the image token."""
    return torch.randint(10, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def image(rows, columns, seed=0):
    """float[rows * columns, C*p*p]: random patches of an image."""
    return torch.randn(rows * columns, 3 * PATCH**2, generator=torch.Generator().manual_seed(seed))


def prompt(*rows, patch_merge=1):
    """Model inputs of a left-padded batch of lists of words (int), images ((rows, columns, seed)) and videos ((rows,
    columns, seed, frames)), whose sizes are in tokens."""
    ids, images, shapes = [], [], []
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, int):
                ids[-1].append(part)
            else:
                height, width, seed, frames = (*part, 1)[:4]
                ids[-1] += [IMAGE] * (frames * height * width)
                shapes.append((frames, patch_merge * height, patch_merge * width))
                images.append(image(frames * shapes[-1][1], shapes[-1][2], seed))
    longest = max(map(len, ids))
    masks = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    ids = [[0] * (longest - len(row)) + row for row in ids]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
    if images:
        inputs |= {"pixel_values": torch.cat(images), "image_grid_thw": torch.tensor(shapes)}
    return inputs


def states_of_blocks(vora, **inputs):
    """list of float[B, T, D]: the output of every block of the LLM."""
    outputs = []
    hooks = [block.register_forward_hook(lambda *given: outputs.append(given[-1])) for block in vora.model.blocks]
    logits_of(vora, **inputs)
    for hook in hooks:
        hook.remove()
    return [output[0] if isinstance(output, tuple) else output for output in outputs]


def save_tiny_llm(folder, tokenizer=None, **changes):
    """A tiny Llama, its configuration changed, with its tokenizer, saved as on the hub; returns the folder."""
    tokenizer = tokenizer or tiny_tokenizer()
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": len(tokenizer)} | changes
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_a_little(peft_model):
    """Move what trains, as training would."""
    torch.manual_seed(2)
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def logits_of(model, **inputs):
    return model(**inputs, use_cache=False).logits


def generate(vora, inputs, **kwargs):
    """int[B, new tokens]: greedy unless told otherwise; the image token and the end are never generated."""
    kwargs = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE, 2], "pad_token_id": 0} | kwargs
    return vora.generate(**inputs, **kwargs)[:, inputs["input_ids"].shape[1] :]


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "user assistant system what colour is the shape? blue red green circle square triangle yes no",
    "Is there a teal shape in the image? How many triangles are to be seen? two, one, none.",
]


def tiny_tokenizer(chat_template=CHATML, sentencepiece=False, **special):
    """A BPE of at most 400 tokens with ChatML's markers and, like many an LLM's, no padding token.

    Byte-level, or in the manner of SentencePiece, which puts a space before the first word of a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


class InFourBits(torch.nn.Module):
    """A linear layer as bitsandbytes keeps it: its weight is stored in integers."""

    def __init__(self, linear):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
        self.bias = linear.bias
        self._computed = [linear]

    def forward(self, states):
        return self._computed[0](states)


@torch.no_grad()
def log_prob_of_answer(model, processor, example, answer):
    """Log-probability of an answer to an `Example`, in a forward pass of its own."""
    content = [{"type": "image", "image": one} for one in example.images()]
    content.append({"type": "text", "text": example.prompt})
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    sample = {name: torch.as_tensor(value) for name, value in processor.training_sample(messages).items()}
    labels = sample.pop("labels")[1:]
    inputs = {name: value[None] if name == "input_ids" else value for name, value in sample.items()}
    log_probs = model(**inputs).logits[0, :-1].log_softmax(-1)
    return sum(float(log_probs[place, labels[place]]) for place in range(len(labels)) if labels[place] != -100)
