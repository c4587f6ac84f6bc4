"""How well a model sees: exact answers, and what a blind one would score."""
