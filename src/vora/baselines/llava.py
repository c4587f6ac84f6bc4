"""LLaVA's way, the baseline: a frozen ViT reads the image, and an MLP brings its features to the LLM's width.

Only what embeds images differs from a VoRA student: tokens, packing, labels, trainer and evaluation are the same.
Source: arXiv 2304.08485, with the MLP of 2310.03744; tower and projector are those of transformers' LLaVA.

Dims: P patches of all images, m = patch_merge, D_t = the ViT's width, D = LLM width, N images.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from vora.build.from_llm import from_llm, scale_of_text
from vora.distill.teacher import Teacher, images_of_patches
from vora.model.configuration_vora import VoraConfig
from vora.model.modeling_vora import VoraForConditionalGeneration, VoraModel
from vora.model.patch_embed import merge_neighbours

HALF = (0.5, 0.5, 0.5)


class VoraLlavaConfig(VoraConfig):
    """Configuration of [`VoraLlavaForConditionalGeneration`]; its code does not ship in a checkpoint.

    Args:
        vision_feature_layer: which of the ViT's hidden states is read, from the end; LLaVA's last but one.
        image_mean, image_std: per channel, of patches as the image processor makes them and the ViT expects them.
    """

    _auto_class = None  # type: ignore[assignment]
    model_type = "vora_llava"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self, text_config: PreTrainedConfig | dict | None = None,
        vision_config: PreTrainedConfig | dict | None = None, vision_feature_layer: int = -2,
        image_mean: Sequence[float] = HALF, image_std: Sequence[float] = HALF, image_attention: str = "causal",
        **kwargs: Any,
    ):  # fmt: skip
        if isinstance(vision_config, dict):
            vision_config = dict(vision_config)
            vision_config = AutoConfig.for_model(vision_config.pop("model_type"), **vision_config)
        self.vision_config = AutoConfig.for_model("vit") if vision_config is None else vision_config
        self.vision_feature_layer = vision_feature_layer
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        super().__init__(text_config=text_config, image_attention=image_attention, **kwargs)


class LlavaVision(nn.Module):
    """In the place of a VoRA student's patch embedding: the same patches to as many image tokens.

    The images are put together again from the patches, so the ViT sees the very pixels that a VoRA student sees. The
    features of m x m neighbouring patches go through the projector side by side; m = 1 is LLaVA itself.
    """

    def __init__(self, config: VoraLlavaConfig):
        super().__init__()
        self.config = config
        self.encoder = Teacher(AutoModel.from_config(config.vision_config), config.image_mean, config.image_std)
        shape = SimpleNamespace(
            vision_config=SimpleNamespace(hidden_size=config.patch_merge**2 * self.encoder.hidden_size),
            text_config=config.text_config,
            vision_feature_layer=config.vision_feature_layer,
            multimodal_projector_bias=True,
            projector_hidden_act="gelu",
        )
        self.projector = LlavaMultiModalProjector(shape)

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> torch.Tensor:
        """float[P, C*p*p] patches and int[N, 3] grids to float[P / m^2, D] image tokens."""
        config, shapes = self.config, image_grid_thw.tolist()
        grids = [(rows, columns) for frames, rows, columns in shapes for _ in range(frames)]
        images = images_of_patches(pixel_values, grids, config.patch_size, config.image_mean, config.image_std)
        block = self.encoder.num_blocks + config.vision_feature_layer
        features = self.encoder(images, grids, [block])[block].clone()  # what inference mode made cannot be trained on
        features = merge_neighbours(features, shapes, config.patch_merge).flatten(1)
        return self.projector(features.to(self.projector.linear_1.bias.dtype))  # weights may be of 4 bits, as integers


class VoraLlavaModel(VoraModel):
    """ViT, projector and decoder: token ids and patches to hidden states."""

    _auto_class = None  # type: ignore[assignment]
    config_class = VoraLlavaConfig  # type: ignore[assignment]
    patch_embedding_class = LlavaVision  # type: ignore[assignment]


class VoraLlavaForConditionalGeneration(VoraForConditionalGeneration):
    """An LLM that reads images as LLaVA does, in the form of a VoRA student."""

    _auto_class = None  # type: ignore[assignment]
    config_class = VoraLlavaConfig  # type: ignore[assignment]
    model_class = VoraLlavaModel  # type: ignore[assignment]
    trained_vision = "projector"  # what trains beside the LoRA: all of `patch_embedding` but the encoder

    @classmethod
    def from_llm(
        cls, llm: str | PreTrainedModel, *, encoder: Teacher, patch_size: int | None = None,
        image_size: int | None = None, **options: Any,
    ) -> "VoraLlavaForConditionalGeneration":  # fmt: skip
        """Put a ViT, which becomes part of the model, and a fresh projector before an LLM, with the options of
        `vora.from_llm`; the sizes are the encoder's own by default."""
        sizes = encoder.embedding.config_fields(patch_size, image_size)
        options |= {"patch_size": sizes["patch_size"], "image_size": sizes["image_size"], "image_attention": "causal"}
        vora = from_llm(llm, **options)
        kept = ("text_config", "image_token_id", "patch_merge", "lm_head_bias", "dtype")
        config = VoraLlavaConfig(
            vision_config=getattr(encoder.vit.config, "vision_config", encoder.vit.config),
            image_mean=encoder.image_mean,
            image_std=encoder.image_std,
            **sizes | {name: getattr(vora.config, name) for name in kept},
        )
        model = cls.wrap(vora, config, encoder)
        embedding: Any = model.model.patch_embedding
        side = max(1, config.grid_size // config.patch_merge) * config.patch_merge
        pixels = torch.randn(side**2, config.num_channels * config.patch_size**2, device=model.device)
        with torch.no_grad():
            tokens = embedding(pixels, torch.tensor([[1, side, side]]))
            embedding.projector.linear_2.weight.mul_(scale_of_text(model, tokens).to(model.dtype))
        return model

    @classmethod
    def wrap(
        cls, vora: VoraForConditionalGeneration, config: VoraLlavaConfig, encoder: Teacher
    ) -> "VoraLlavaForConditionalGeneration":
        """An encoder and a fresh projector before the LLM of a VoRA model, which is held, not copied."""
        with torch.device("meta"):
            model = cls(config)
        model.model.language_model, model.lm_head = vora.model.language_model, vora.lm_head
        embedding: Any = model.model.patch_embedding
        embedding.encoder = encoder.to(vora.device, vora.dtype)
        embedding.projector.to_empty(device=vora.device).to(vora.dtype).apply(model._init_weights)
        model.set_attn_implementation(vora.config._attn_implementation)
        model.tie_weights()
        model.generation_config = vora.generation_config
        return model.eval()

    def requires_grad_(self, requires_grad: bool = True) -> "VoraLlavaForConditionalGeneration":
        """As any module's, but the encoder never trains."""
        super().requires_grad_(requires_grad)
        self.model.patch_embedding.encoder.requires_grad_(False)
        return self
