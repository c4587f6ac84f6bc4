"""Throughput of many clients against one, through the API of `vora serve`, and a load of mixed clients.

    python benchmarks/serve.py -m MODEL                      # tokens/s of 16 clients, baseline: one client, same run
    python benchmarks/serve.py -m MODEL --minutes 5          # 64 mixed clients: lost, mixed up, stalled, memory

The server is a process of its own, with `--threads` threads. Clients use plain HTTP: text, one image, two images;
whole and streamed; in the load some break off and some send what is wrong. What is right is the answer alone, greedy.
"""

import argparse
import base64
import collections
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests
from PIL import Image, ImageDraw

QUESTIONS = ("What is in the image?", "Describe the image in a few words.", "What colours are there?", "Who are you?")


def image_url(number: int) -> str:
    """A drawn image as a data URL."""
    draw = random.Random(number)
    image = Image.new("RGB", (192, 192), tuple(draw.randrange(256) for _ in range(3)))
    for _ in range(4):
        x, y = draw.randrange(150), draw.randrange(150)
        ImageDraw.Draw(image).ellipse((x, y, x + 40, y + 40), tuple(draw.randrange(256) for _ in range(3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body_of(number: int, max_tokens: int, max_images: int = 2) -> dict:
    """A request: the same for the same number."""
    images = [image_url(number + one) for one in range(number % (max_images + 1))]
    content = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    content.append({"type": "text", "text": f"{QUESTIONS[number % 4]} ({number})"})
    messages = [{"role": "user", "content": content}]
    return {"model": "served", "messages": messages, "max_tokens": max_tokens, "temperature": 0}


class Server:
    """`vora serve` in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.url = f"http://127.0.0.1:{options.port}"
        command = [sys.executable, "-m", "vora", "serve", "--engine", options.engine, "--port", str(options.port)]
        command += ["--name", "served", *(["-m", options.model] if options.model else [])]
        name = "quant" if options.engine == "llama.cpp" else "dtype"
        command += [f"--{name}", value] if (value := getattr(options, name, None)) else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(command, env=environment)
        while True:
            if self.process.poll() is not None:
                raise SystemExit("The server ended.")
            try:
                requests.get(f"{self.url}/health", timeout=10).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.5)

    def ask(self, body: dict) -> dict:
        found = self.post(body)
        found.raise_for_status()
        return found.json()

    def post(self, body: dict, **options: bool) -> requests.Response:
        return requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=600, **options)

    def stream(self, body: dict, pieces: int | None = None) -> str:
        """The text of a stream, of its first pieces only where their number is given."""
        text, count = "", 0
        with self.post(body | {"stream": True}, stream=True) as events:
            events.raise_for_status()
            for line in events.iter_lines(chunk_size=1):
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    count += 1
                if count == pieces:
                    break
        return text

    @property
    def megabytes(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def stop(self) -> float:
        """Seconds that it takes to end."""
        began = time.monotonic()
        self.process.terminate()
        self.process.wait(60)
        return time.monotonic() - began


def throughput(server: Server, clients: int, requests: int, max_tokens: int) -> float:
    """Tokens of answers per second."""
    bodies = [body_of(number, max_tokens) for number in range(requests)]
    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(server.ask, bodies))
    return sum(answer["usage"]["completion_tokens"] for answer in answers) / (time.monotonic() - began)


def load(server: Server, clients: int, minutes: float, max_tokens: int) -> collections.Counter:
    """What became of the requests of mixed clients."""
    wanted = {n: server.ask(body_of(n, 4 + n % max_tokens))["choices"][0]["message"]["content"] for n in range(24)}
    found: collections.Counter = collections.Counter()
    end, lock, memory, slowest = time.monotonic() + 60 * minutes, threading.Lock(), [], [0.0]

    def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            number, kind, began = draw.randrange(24), draw.random(), time.monotonic()
            body = body_of(number, 4 + number % max_tokens)
            try:
                if kind < 0.1:
                    server.stream(body, pieces=3)
                    outcome = "broken off by us"
                elif kind < 0.2:
                    wrong = body | draw.choice([{"model": "x"}, {"messages": 3}, {"max_tokens": 10**6}])
                    status = server.post(wrong).status_code
                    outcome = "wrong and refused" if status in (400, 404) else f"wrong but {status}"
                else:
                    text = server.stream(body) if kind < 0.6 else server.ask(body)["choices"][0]["message"]["content"]
                    outcome = "as alone" if text == wanted[number] else "not as alone"
            except requests.HTTPError as error:
                outcome = f"status {error.response.status_code}"
            except requests.RequestException as error:
                outcome = f"lost ({type(error).__name__})"
            with lock:
                found[outcome] += 1
                slowest[0] = max(slowest[0], time.monotonic() - began)

    with ThreadPoolExecutor(clients) as pool:
        for seed in range(clients):
            pool.submit(client, seed)
        while time.monotonic() < end:
            memory.append(server.megabytes)
            time.sleep(min(5.0, 6 * minutes))
    print(f"memory in MB at the start, in the middle, at the end: {memory[0]:.0f}, {memory[len(memory) // 2]:.0f}, "
          f"{memory[-1]:.0f}; the slowest request took {slowest[0]:.1f} s")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="by default the package's")
    parser.add_argument("--engine", default="transformers")
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--minutes", type=float, help="of a load of mixed clients, instead of throughput")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    options = parser.parse_args()
    server = Server(options)
    try:
        throughput(server, 2, 4, 8)  # to warm up
        if options.minutes:
            figures = dict(load(server, max(options.clients, 64), options.minutes, options.max_tokens))
        else:
            alone = throughput(server, 1, 6, options.max_tokens)
            together = throughput(server, options.clients, 3 * options.clients, options.max_tokens)
            figures = {"one client, tokens/s": alone, f"{options.clients} clients, tokens/s": together}
            figures["ratio"] = together / alone
    finally:
        seconds = server.stop()
    for name, value in figures.items():
        print(f"{name}: {value:.4g}")
    print(f"stopped in {seconds:.1f} s")
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
