"""How a model sees an image."""
