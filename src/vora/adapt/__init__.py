"""Scaffolding 1: put vision LoRA on an LLM and take it off again."""
