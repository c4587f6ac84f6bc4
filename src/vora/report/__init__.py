"""How things look: HTML, images, plots, Markdown. Knows nothing of vora."""
