"""Files to samples to packed batches."""
