"""From an LLM, and a ViT, to a fresh model; LoRA on and off."""
