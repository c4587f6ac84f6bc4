"""A frozen ViT teaches the LLM's first blocks, block by block; none of it stays in the model."""
