"""Numbers of predictions, with intervals."""
