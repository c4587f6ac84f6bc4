"""Whether a model looks at the image."""
