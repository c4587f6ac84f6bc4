"""easy-VQA's test questions through the OpenAI API of `vora serve`: share answered exactly, one engine beside another.

    python benchmarks/serve_vqa.py -m vora-quickstart/model --max-samples 1000

The first engine named is the baseline of the others.
"""

import argparse
import base64
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from serve import Server

from vora.data.readers import load_source


def questions(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """(data URL of an image, question, answer), the same ones for the same seed."""
    found = []
    for sample in load_source("easy-vqa", "test"):
        url = "data:image/png;base64," + base64.b64encode(Path(sample.images[0]).read_bytes()).decode()
        found += [(url, asked["content"], said["content"]) for asked, said in sample.conversations]
    return random.Random(seed).sample(found, min(count, len(found)))


def answers(server: Server, asked: list[tuple[str, str, str]], clients: int) -> list[str]:
    """What the server says to each."""

    def ask(one: tuple[str, str, str]) -> str:
        url, question, _ = one
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        body = {"model": "served", "messages": messages, "max_tokens": 8, "temperature": 0}
        return server.ask(body)["choices"][0]["message"]["content"].strip()

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(ask, asked))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="by default the package's")
    parser.add_argument("--engines", nargs="+", default=["transformers", "llama.cpp"])
    parser.add_argument("--max-samples", type=int, default=1000, help="questions, drawn from all of the test part")
    parser.add_argument("--quant", help="of llama.cpp's weights")
    parser.add_argument("--dtype", help="of transformers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    asked, said, figures = questions(options.max_samples), {}, {}
    for engine in options.engines:
        server = Server(argparse.Namespace(**{**vars(options), "engine": engine}))
        try:
            said[engine] = answers(server, asked, options.clients)
        finally:
            server.stop()
        right = [one == wanted for one, (_, _, wanted) in zip(said[engine], asked)]
        figures[engine] = {"accuracy": sum(right) / len(asked), "num_questions": len(asked)}
        same = [one == other for one, other in zip(said[engine], said[options.engines[0]])]
        figures[engine]["same_answers"] = sum(same) / len(asked)
        print(f"{engine}: {sum(right) / len(asked):.1%} of {len(asked)} questions right, {sum(same) / len(asked):.1%} "
              f"answered as by {options.engines[0]}", flush=True)  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
