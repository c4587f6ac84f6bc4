"""An LLM with a patch embedding in front: the whole of a VoRA model once the vision LoRA is merged.

Dims: B rows, T tokens, P patches, N images, D = LLM width, V = vocabulary, L = label tokens.
"""

import copy
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .attention import attention_masks, image_blocks
from .configuration_vora import VoraConfig
from .patch_embed import PatchEmbedding, put_tokens

# What this release of transformers calls a cache; `forward` and `generate` here take both names
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"


class VoraPreTrainedModel(PreTrainedModel):
    config_class = VoraConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = False  # flash kernels cannot express a bidirectional block inside a causal row
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, PatchEmbedding):
            nn.init.normal_(module.position, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Raises ValueError beside another model's adapter, which `from_pretrained` would add to this one."""
        if os.path.exists(os.path.join(save_directory, "adapter_config.json")):
            raise ValueError(
                f"{save_directory} holds an adapter, which would be added to this model whenever it is loaded: save "
                "to another folder, or delete adapter_config.json first."
            )
        generation_config = getattr(self, "generation_config", None)
        if generation_config is None:
            return super().save_pretrained(save_directory, **kwargs)
        self.generation_config = copy.copy(generation_config)
        self.generation_config.__class__ = _AsItCame
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.generation_config = generation_config


class _AsItCame(GenerationConfig):
    """Of an LLM; transformers would not save some, such as those with a temperature and without sampling."""

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is refused."""


class VoraModel(VoraPreTrainedModel):
    """Patch embedding and decoder: token ids and patches to hidden states."""

    _auto_class = "AutoModel"
    patch_embedding_class = PatchEmbedding

    def __init__(self, config: VoraConfig):
        super().__init__(config)
        self.patch_embedding = self.patch_embedding_class(config)
        self.language_model = AutoModel.from_config(config.text_config)
        config.text_config = self.language_model.config  # not a copy, which would miss a change of attention
        self._no_split_modules = self.language_model._no_split_modules
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, embeddings: nn.Module) -> None:
        self.language_model.set_input_embeddings(embeddings)

    @property
    def blocks(self) -> nn.ModuleList:
        """The LLM's transformer blocks, whatever its family calls them."""
        depth = self.config.get_text_config().num_hidden_layers
        return next(m for m in self.language_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """float[P, C*p*p] patches of N images to image tokens in raster order: `last_hidden_state` of all,
        float[P / patch_merge^2, D], and `pooler_output`, those of each image by themselves, which vLLM asks for."""
        tokens = self.patch_embedding(pixel_values, image_grid_thw)
        sizes = image_grid_thw.prod(-1) // self.config.patch_merge**2
        return BaseModelOutputWithPooling(tokens, tokens.split(sizes.tolist()))  # type: ignore[arg-type]

    def image_token_mask(self, input_ids: Tensor | None, inputs_embeds: Any) -> Tensor:
        """bool[B, T], True where the prompt holds an image token."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None, image_numbers: Tensor | None = None,
        seen_until: Tensor | None = None, cache: Cache | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Hidden states of a batch of token sequences that mix text and images.

        Args:
            input_ids: int[B, T], `config.image_token_id` once per (merged) patch; or `inputs_embeds` float[B, T, D].
            attention_mask: int[B, T], 0 at padding; None for packed sequences, whose `position_ids` restart.
            pixel_values: float[P, C*p*p], normalised patches of all images, raster order, each flattened (C, p, p).
            image_grid_thw: int[N, 3], frames, patch rows, patch columns of each image.
            image_numbers: int[B, T] from `image_blocks`, if known; to find and check it, a GPU is waited for.
            seen_until: int[B, T], see `attention_masks`.

        Raises:
            ValueError: image tokens and images do not match; both counts are named.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if (pixel_values is None) != (image_grid_thw is None):
            raise ValueError("Give pixel_values and image_grid_thw together, as the processor returns them.")
        blocks: Tensor | None = None
        is_image: Any = None
        if image_grid_thw is not None:  # first, since the ids of another processor may be outside of the vocabulary
            image_grid_thw = image_grid_thw.cpu()  # once, for a GPU is waited for
            is_image = self.image_token_mask(input_ids, inputs_embeds)
            if image_numbers is None:
                image_numbers = image_blocks(is_image, image_grid_thw, self.config.patch_merge)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        cache = past_key_values if cache is None else cache

        if pixel_values is not None and image_grid_thw is not None:
            inputs_embeds = put_tokens(inputs_embeds, is_image, self.patch_embedding(pixel_values, image_grid_thw))
            if self.config.image_attention == "bidirectional":
                blocks = image_numbers
        elif cache is None and input_ids is not None:
            self._check_no_image_tokens(input_ids)

        # Text alone takes the LLM's own road, mask included, so its logits stay the LLM's to the last bit.
        if blocks is not None or seen_until is not None:
            given = inputs_embeds, attention_mask, cache, position_ids, blocks, seen_until
            attention_mask = attention_masks(self.config.get_text_config(), *given)
        kwargs |= {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: cache}
        outputs = self.language_model(inputs_embeds=inputs_embeds, **kwargs)
        kept = getattr(outputs, CACHE), outputs.hidden_states, outputs.attentions
        return BaseModelOutputWithPast(outputs.last_hidden_state, *kept)

    def _check_no_image_tokens(self, input_ids: Tensor) -> None:
        if num_orphans := int((input_ids == self.config.image_token_id).sum()):
            raise ValueError(
                f"The prompt has {num_orphans} image tokens (id {self.config.image_token_id}) but 0 images were "
                "given: pass pixel_values and image_grid_thw from the processor."
            )


class VoraForConditionalGeneration(VoraPreTrainedModel, GenerationMixin):
    """A decoder LLM that reads images: `VoraModel` and the LLM's output layer."""

    _auto_class = "AutoModelForImageTextToText"
    model_class = VoraModel

    def __init__(self, config: VoraConfig):
        super().__init__(config)
        self.model = self.model_class(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=config.lm_head_bias)
        if config.tie_word_embeddings:
            embeddings = self.get_input_embeddings()
            name = next(name for name, module in self.named_modules() if module is embeddings)
            self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None, inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None, labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0, num_items_in_batch: int | Tensor | None = None, cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """`VoraModel.forward`, then logits float[B, T, V].

        Args:
            labels: int[B, T], the token at each place, -100 where none is to be predicted.
            logits_to_keep: only the logits of that many last tokens (0: all), or int[K] indices into T.
        """
        cache = past_key_values if cache is None else cache
        inputs = input_ids, attention_mask, position_ids, cache, inputs_embeds, pixel_values, image_grid_thw
        outputs = self.model(*inputs, return_dict=True, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # contiguous, for a processor's bf16 product of a strided batch copies the weights for each row
        logits = self.logits(outputs.last_hidden_state[:, keep].contiguous())
        loss = None
        if labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            loss = self.lm_loss(outputs.last_hidden_state, targets, num_items_in_batch)
        kept = getattr(outputs, CACHE), outputs.hidden_states, outputs.attentions
        return CausalLMOutputWithPast(loss, logits, *kept)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """float[..., D] final hidden states to float[..., V] logits, scaled and capped as the LLM's own."""
        config = self.config.get_text_config()
        logits = self.lm_head(hidden_states)
        if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite divides
            logits = logits / scaling
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere multiplies
            logits = logits * scale
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma
            logits = torch.tanh(logits / cap) * cap
        return logits

    def lm_loss(
        self, hidden_states: Tensor, targets: Tensor, num_items_in_batch: float | Tensor | None = None
    ) -> Tensor:
        """Cross-entropy in float32 where int[B, T] is not -100, by the label tokens of a step's micro-batches; None:
        by those present. Logits are made only there."""
        is_label = targets != -100
        if not is_label.any():
            raise ValueError(
                f"All {targets.numel()} labels are masked (-100): there is nothing to predict. "
                "Check that the chat template marks assistant turns and that sequences are not truncated before them."
            )
        logits, labels = self.logits(hidden_states[is_label]).float(), targets[is_label]
        total = len(labels) if num_items_in_batch is None else num_items_in_batch
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / total

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' `generate`; the image token is not generated, also where `suppress_tokens` are given."""
        ids = kwargs.get("input_ids", inputs)
        cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))
        if cache is not None:
            kwargs[CACHE] = cache
        elif ids is not None and kwargs.get("pixel_values") is None:
            self.model._check_no_image_tokens(ids)
        if "suppress_tokens" in kwargs:  # the generation config's hold it already
            kwargs["suppress_tokens"] = [*(kwargs["suppress_tokens"] or []), self.config.image_token_id]
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Any = None, inputs_embeds: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        kwargs |= {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get("pixel_values") is not None:
            inputs["attention_mask"] = attention_mask  # still two-dimensional: forward adds the blocks of the images
        else:
            inputs.pop("image_grid_thw", None)  # generate drops the pixels after the first step, but not the grids
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeat whole images, not patches, for beams and several returned sequences."""
        pixel_values, grids = model_kwargs.pop("pixel_values", None), model_kwargs.pop("image_grid_thw", None)
        expanded = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if pixel_values is None:
            return expanded
        if expand_size > 1:
            embeds = model_kwargs.get("inputs_embeds")
            is_image = self.model.image_token_mask(input_ids if embeds is None else None, embeds)
            image_blocks(is_image, grids, self.config.patch_merge)  # raises where tokens and images do not match
            num_patches = is_image.sum(-1) * self.config.patch_merge**2
            row_of_image = torch.searchsorted(num_patches.cumsum(0), grids.prod(-1).cumsum(0).to(num_patches.device))
            pixels_of_rows = pixel_values.split(num_patches.tolist())
            grids_of_rows = grids.split(row_of_image.bincount(minlength=len(num_patches)).tolist())
            pixel_values = torch.cat([one for one in pixels_of_rows for _ in range(expand_size)])
            grids = torch.cat([one for one in grids_of_rows for _ in range(expand_size)])
        return expanded[0], expanded[1] | {"pixel_values": pixel_values, "image_grid_thw": grids}
