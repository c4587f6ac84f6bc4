"""Fills the page of recipe keys."""

from typing import Any

from vora.train.reference import markdown as reference

MARK = "<!-- reference of the keys -->"


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARK, reference()) if MARK in markdown else markdown
