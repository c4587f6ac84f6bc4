"""How things look: HTML, plots, Markdown; imports nothing of vora."""
