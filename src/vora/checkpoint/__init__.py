"""What a model folder is: written with everything saved, read in one place."""
