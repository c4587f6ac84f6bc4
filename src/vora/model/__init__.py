"""What ships in a checkpoint: configuration, model, image processor, processor."""
