"""What each choice is worth: a grid of short runs, beside each other at equal samples."""
