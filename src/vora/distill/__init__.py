"""Scaffolding 2: a frozen ViT teaches the LLM's first blocks, block by block."""
