"""The configuration of a VoRA model: the language model's own, plus a few flat fields for images."""

import os
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

# Saved folders carry this package's model files and load with trust_remote_code where it is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_vora.VoraConfig",
    "AutoImageProcessor": "image_processing_vora.VoraImageProcessor",
    "AutoModel": "modeling_vora.VoraModel",
    "AutoModelForImageTextToText": "modeling_vora.VoraForConditionalGeneration",
    "AutoProcessor": "processing_vora.VoraProcessor",
}


class VoraConfig(PreTrainedConfig):
    """Configuration of [`VoraForConditionalGeneration`].

    Args:
        text_config: of the decoder LLM, an object or a dict.
        image_token_id: in-vocabulary id that stands for one image token in `input_ids`.
        patch_size: p, side of a patch in pixels.
        patch_merge: m; m x m neighbouring patches become one image token.
        image_size: side in pixels of the square whose grid of patches the learned positions cover.
        vision_hidden_size: d_vit, width of the patch embedding before its projection to the LLM's width.
        patch_norm: whether an RMSNorm follows the patch projection, as in the paper.
        axial_positions: positions are a row's plus a column's, never resampled, not a table of image_size's grid.
        image_attention: "bidirectional", tokens of one image see all of it (the paper's), or "causal".
        lm_head_bias: whether the LLM's output layer has a bias.

    Raises:
        ValueError: a value that cannot work.
    """

    _auto_class = "AutoConfig"
    model_type = "vora"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self, text_config: Any = None, image_token_id: int = 0, patch_size: int = 14,
        patch_merge: int = 1, image_size: int = 448, num_channels: int = 3, vision_hidden_size: int = 768,
        patch_norm: bool = True, patch_norm_eps: float = 1e-5, image_attention: str = "bidirectional",
        lm_head_bias: bool = False, initializer_range: float = 0.02, tie_word_embeddings: bool | None = None,
        axial_positions: bool = False, **kwargs: Any,
    ):  # fmt: skip
        if text_config is None or isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**{"model_type": "llama", **(text_config or {})})
        self.text_config = text_config
        if image_size < patch_size:
            raise ValueError(
                f"image_size {image_size} holds no patch of {patch_size} x {patch_size} pixels: "
                "raise image_size or lower patch_size."
            )
        if not 0 <= image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id {image_token_id} lies outside the vocabulary of {self.text_config.vocab_size} "
                "tokens: reuse a spare special token, or resize the LLM's embeddings first."
            )
        if image_attention not in ("bidirectional", "causal"):
            raise ValueError(f"image_attention {image_attention!r} is unknown: give bidirectional or causal.")
        self.image_token_id, self.axial_positions = image_token_id, axial_positions
        self.patch_size, self.patch_merge, self.image_size = patch_size, patch_merge, image_size
        self.num_channels, self.vision_hidden_size, self.lm_head_bias = num_channels, vision_hidden_size, lm_head_bias
        self.patch_norm, self.patch_norm_eps, self.initializer_range = patch_norm, patch_norm_eps, initializer_range
        # vLLM reads it: the tokens of one image attend to each other in both directions
        self.image_attention, self.is_mm_prefix_lm = image_attention, image_attention == "bidirectional"
        kwargs.pop("is_mm_prefix_lm", None)
        if tie_word_embeddings is None:
            tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(token, getattr(self.text_config, token, None))
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        if self._auto_class:  # not of a subclass, whose code does not ship
            self.auto_map = dict(AUTO_MAP)
        for name in self.sub_configs:
            if os.path.exists(getattr(self, name).name_or_path):
                getattr(self, name).name_or_path = ""  # a folder of this machine is nobody else's business
        super().save_pretrained(save_directory, **kwargs)

    @property
    def grid_size(self) -> int:
        """Side of the grid of learned positions, in patches."""
        return self.image_size // self.patch_size
