"""The main job: an LLM that learns to see, with what the Python package index has."""
