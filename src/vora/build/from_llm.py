"""From an LLM, and a ViT if there is one, to a fresh VoRA model and its processor, and back to the LLM alone."""

import copy
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from vora.build.base_llm import choose_image_token, grow_for_image_token, load_llm, load_tokenizer
from vora.build.vit_init import vit_embedding
from vora.model.configuration_vora import VoraConfig
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.patch_embed import PatchEmbedding
from vora.model.processing_vora import VoraProcessor


def from_llm(
    llm: str | PreTrainedModel, *, teacher: Any = None, patch_size: int | None = None, image_size: int | None = None,
    patch_merge: int = 1, axial_positions: bool = False, image_attention: str = "bidirectional",
    image_token_id: int | None = None, tokenizer: PreTrainedTokenizerBase | None = None, **llm_kwargs: Any,
) -> VoraForConditionalGeneration:  # fmt: skip
    """A VoRA model with a fresh patch embedding in front of an LLM.

    Args:
        llm: hub id, folder, folder with a GGUF file, the alias `smollm2-135m`, or a loaded causal LM.
        teacher: a plain ViT of transformers (model, folder or hub id) whose patch projection and positions the patch
            embedding starts from; it also sets the defaults of the two sizes, which are 14 and 448 without one.
        image_size: side in pixels of the square that the learned positions cover.
        axial_positions: a patch's position is its row's plus its column's, counted from the corner, never resampled.
        patch_merge: m; m x m neighbouring patches become one image token.
        image_token_id: a token of the vocabulary; by default the tokenizer's own or a spare special token.
        tokenizer: of a loaded LLM whose vocabulary was changed; `processor_from_llm` is given the same object.
        llm_kwargs: as for `AutoModelForCausalLM.from_pretrained` (`dtype`, `attn_implementation`, ...).

    Raises:
        ValueError: the LLM's logits or attention cannot be repeated here, sizes do not fit the teacher, or the
            vocabulary was resized and no tokenizer is given.
    """
    llm = load_llm(llm, **llm_kwargs)
    attention = llm.config._attn_implementation  # before configurations are nested, which forgets it
    if image_token_id is None:
        image_token_id = grow_for_image_token(llm, tokenizer)
    embedding = None if teacher is None else vit_embedding(teacher)
    sizes: dict[str, Any] = {"patch_size": patch_size or 14, "image_size": image_size or 448}
    sizes |= {} if embedding is None else embedding.config_fields(patch_size, image_size)
    config = VoraConfig(
        text_config=llm.config.get_text_config(),
        image_token_id=image_token_id,
        lm_head_bias=llm.get_output_embeddings().bias is not None,
        patch_merge=patch_merge,
        axial_positions=axial_positions,
        image_attention=image_attention,
        dtype=llm.dtype,
        **sizes,
    )
    model = wrap_llm(llm, config)
    if embedding is not None:
        embedding.copy_to(model.model.patch_embedding)
    model.set_attn_implementation(attention)
    match_embedding_scale(model)
    check_wrapped_llm(model, llm)
    return model


def wrap_llm(llm: PreTrainedModel, config: VoraConfig) -> VoraForConditionalGeneration:
    """A model of this configuration with a fresh patch embedding that holds a loaded causal LM, not a copy of it."""
    with torch.device("meta"):
        model = VoraForConditionalGeneration(config)
    # of an LLM that is part of a multimodal model, only the language model
    model.model.language_model = getattr(llm.base_model, "language_model", llm.base_model)
    model.config.text_config = model.model.language_model.config  # not a copy, see `VoraModel`
    model.lm_head = llm.get_output_embeddings()
    model.model.patch_embedding = PatchEmbedding(config).to(llm.device, llm.dtype)
    model.model.patch_embedding.apply(model._init_weights)
    model.tie_weights()
    model.generation_config = copy.deepcopy(llm.generation_config)
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*suppressed, config.image_token_id]  # no answer holds an image
    return model.eval()


def to_llm(model: VoraForConditionalGeneration) -> PreTrainedModel:
    """The language part of a merged model alone, as the stock causal LM it came from. It shares memory with the model;
    a vocabulary that grew by an image token keeps that row. ValueError where vision LoRA is still on."""
    language_model = model.model.language_model
    if extra := [name for name, _ in language_model.named_parameters() if "lora_" in name]:
        raise ValueError(f"{len(extra)} LoRA tensors are still on the LLM: call merge_vision_lora(model) first.")
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(copy.deepcopy(model.config.get_text_config()), dtype=model.dtype)
    llm.base_model.load_state_dict(language_model.state_dict(), assign=True)
    llm.get_output_embeddings().load_state_dict(model.lm_head.state_dict(), assign=True)
    for name, buffer in language_model.named_buffers():  # non-persistent ones, rotary tables among them
        owner, _, leaf = name.rpartition(".")
        setattr(llm.base_model.get_submodule(owner), leaf, buffer)
    llm.tie_weights()
    llm.generation_config = copy.deepcopy(model.generation_config)
    suppressed = [i for i in llm.generation_config.suppress_tokens or [] if i != model.config.image_token_id]
    llm.generation_config.suppress_tokens = suppressed or None
    # transformers saves flags that a model came with (a temperature without sampling), but none that were set since
    llm.generation_config._original_object_hash = hash(llm.generation_config)
    return llm.eval()


def processor_from_llm(
    llm: Path | str | PreTrainedTokenizerBase, *, teacher: Any = None, patch_size: int | None = None,
    image_size: int | None = None, patch_merge: int = 1, chat_template: str | None = None,
    image_markers: Sequence[str] | None = None, **image_kwargs: Any,
) -> VoraProcessor:  # fmt: skip
    """The processor for `from_llm` with the same arguments, where the LLM may also be a tokenizer. Images get at most
    as many tokens as a square of `image_size` has patches.

    Args:
        chat_template: Jinja template instead of the LLM's own.
        image_markers: texts before and after each image, each a token or several.
        image_kwargs: further arguments of `VoraImageProcessor`; a teacher's normalisation is the default.
    """
    tokenizer = load_tokenizer(llm) if isinstance(llm, str | Path) else llm
    image_token, _ = choose_image_token(tokenizer)
    if teacher is not None:
        sizes = vit_embedding(teacher).config_fields(patch_size, image_size)
        patch_size, image_size = sizes["patch_size"], sizes["image_size"]
        for name in ("image_mean", "image_std"):
            if hasattr(teacher, name):
                image_kwargs.setdefault(name, getattr(teacher, name))
    patch_size, image_size = patch_size or 14, image_size or 448
    image_kwargs.setdefault("max_image_tokens", (image_size // (patch_size * patch_merge)) ** 2)
    image_kwargs.setdefault("min_image_tokens", min(4, image_kwargs["max_image_tokens"]))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    template = chat_template or tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:  # one that begins as the tokenizer would
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        plain = (files("vora.build") / "plain_chat.jinja").read_text()
        template = ("{{- bos_token -}}" if begins else "") + plain
    images = VoraImageProcessor(patch_size=patch_size, patch_merge=patch_merge, **image_kwargs)
    processor = VoraProcessor(images, tokenizer, image_token=image_token, image_markers=image_markers or ("", ""))
    return processor.set_template(template)


@torch.no_grad()
def match_embedding_scale(model: VoraForConditionalGeneration) -> None:
    """Scale the last projection so that fresh image tokens are as large as those of text."""
    embedding = model.model.patch_embedding
    num_patches = 64 * embedding.patch_merge**2
    features = embedding.norm(torch.randn(num_patches, embedding.patch.out_features).to(embedding.patch.weight))
    mean_position = embedding.positions_of_grid(embedding.grid_size, embedding.grid_size).mean(0)
    tokens = embedding.projection((features + mean_position).view(64, -1))
    embedding.projection.weight.mul_(scale_of_text(model, tokens).to(embedding.projection.weight.dtype))


@torch.no_grad()
def scale_of_text(model: VoraForConditionalGeneration, image_tokens: torch.Tensor) -> torch.Tensor:
    """float[]: by what image tokens have to be multiplied to be as large as embeddings of text."""
    embeddings = model.get_input_embeddings()
    ids = torch.arange(min(1000, embeddings.num_embeddings), device=embeddings.weight.device)
    return embeddings(ids).float().std() / image_tokens.float().std().clamp_min(1e-12)


@torch.inference_mode()
def check_wrapped_llm(model: VoraForConditionalGeneration, llm: PreTrainedModel) -> None:
    """Check on a few tokens that the wrapped LLM still computes what it computed bare, and that it can see images;
    ValueError where its head, embeddings or attention mask do what would need per-family code."""
    if llm.device.type == "meta":
        return
    family, image = llm.config.model_type, model.config.image_token_id
    ids = torch.arange(3, 11, device=llm.device)[None] % llm.config.get_text_config().vocab_size
    ids[ids == image] = 1
    seeing = ids.clone()
    seeing[0, 3:6] = image
    m = model.config.patch_merge
    patches = torch.randn(3 * m * m, model.model.patch_embedding.patch.in_features, device=llm.device)
    other, grid = patches.clone(), torch.tensor([[1, m, 3 * m]], device=llm.device)
    other[-1] *= -1  # a patch of the last token
    try:
        difference = (model(input_ids=ids).logits - llm(input_ids=ids).logits).abs().max().item()
        states = [
            model.model(input_ids=seeing, pixel_values=pixels, image_grid_thw=grid).last_hidden_state[0, 3]
            for pixels in (patches, other)
        ]
    except Exception as error:  # families fail in their own ways
        cause = " ".join(str(error).split())[:200]
        raise ValueError(f"{family} takes embeddings and masks otherwise, so it is not supported: {cause}") from error
    if not difference == 0:
        raise ValueError(
            f"{family} computes its logits in a way that a wrapper without per-family code cannot repeat "
            f"(difference {difference:.1e} on {ids.numel()} text tokens): this LLM is not supported."
        )
    if torch.equal(*states) and model.config.image_attention == "bidirectional":
        raise ValueError(
            f"{family} ignores the attention mask: the first token of an image does not see its last. "
            "This LLM is not supported; choose one with plain attention."
        )
