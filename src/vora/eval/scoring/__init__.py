"""What a model says, chooses, or holds likely."""
