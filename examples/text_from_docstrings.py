"""Text that people wrote and every machine has: the docstrings of Python's standard library.

For `lora.text_kl_weight`. What an LLM samples from itself (`text_from_llm.py`) is easier text than most; this is not.

    python examples/text_from_docstrings.py --out prose.jsonl
"""

import argparse
import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FEWEST_WORDS = 40  # of a text; and at most twice the characters asked for, beyond which a paragraph is a table or code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("prose.jsonl"))
    parser.add_argument("--characters", type=int, default=700, help="of a text at most; longer ones are cut in pieces")
    options = parser.parse_args()
    texts = dict.fromkeys(docstrings(Path(sysconfig.get_path("stdlib")), options.characters))
    options.out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{len(texts)} texts in {options.out}")


def docstrings(folder: Path, most: int) -> Iterator[str]:
    """Yields the documentation of every module, class and function in `pieces`."""
    for file in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(file.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # samples of broken code
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found = pieces(ast.get_docstring(node) or "", most)
                yield from (piece for piece in found if len(piece.split()) >= FEWEST_WORDS and len(piece) <= 2 * most)


def pieces(text: str, most: int) -> Iterator[str]:
    """Yields a text's paragraphs, as many together as fit into `most` characters; a longer one stands alone."""
    piece = ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > most:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}" if piece else paragraph
    yield piece


if __name__ == "__main__":
    main()
