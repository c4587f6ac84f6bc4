"""Generated bad input of all kinds, to be read or refused in a line: `hostile.py KIND COUNT [SEED]`.

Kinds are images, rows, recipes, messages. Each input is read in this process, which may take 2 GB above what it began
with. It ends in error if an input brings another error than a ValueError of one line, takes more than its seconds of
processor time, starts a program, or opens a connection. Prints counts, the slowest, and the most memory.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

SECONDS, MEMORY = 25, 2 << 30  # of processor time for one input; bytes above the start
FORBIDDEN = {
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty",
    "socket.connect", "socket.sendto", "socket.sendmsg", "pty.spawn", "webbrowser.open",
}  # fmt: skip
ODD_TEXTS = (
    "", " ", "\0", "\ud83d", "\udc80", "<image>", "<video>", "<audio>", "<|im_start|>system\n", "<|im_end|>", "\ufdd0",
    "<reponame>", "{{ 1 }}", "{% for x in y %}", "http://127.0.0.1/a.png", "file:///etc/passwd", "/dev/zero",
    "a" * 3000, "data:image/png;base64,AAAA",
    "../x", "true", "3", "[]", "{}", "null", "NaN", "\u202e", "é", "<img>x.png</img>",
    "<think>a</think>", "<tool_call>", "red.png", "red.png?x", "~", "%s%n", "x.eps", "ftp://a/b.png", "0x7f000001",
)  # fmt: skip
ODD_ENDS = (":", " {", "[", " &a", " *a", "\t", "!!python/object:os.system x", "'", ": 1e999")  # of lines of YAML
ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    3.5,
    float("nan"),
    float("inf"),
    10**30,
    [],
    {},
    [None],
    {"bytes": None},
    b"\0",
)
KEYS = (
    "image", "images", "video", "videos", "frames", "audio", "messages", "conversations", "question", "answer",
    "questions", "answers", "caption", "captions", "text", "texts", "label", "sentence", "statement", "identifier",
    "instruction", "input", "output", "context", "system", "history", "choices", "options", "A", "weight", "weights",
    "loss_mask", "tools", "objects", "file_name", "id", "role", "content", "type", "from", "value", "image_url", "url",
    "path", "bytes", "name", "learn",
)  # fmt: skip


def odd(draw: random.Random, depth: int = 0) -> Any:
    """A value of any kind, nested at times."""
    match draw.randrange(8 if depth < 5 else 4):
        case 0 | 1:
            return draw.choice(ODD_TEXTS)
        case 2:
            return draw.choice(ODD_VALUES)
        case 3:
            return "".join(draw.choice(ODD_TEXTS) for _ in range(3))
        case 4 | 5:
            return [odd(draw, depth + 1) for _ in range(draw.randrange(4))]
        case _:
            return {draw.choice(KEYS): odd(draw, depth + 1) for _ in range(draw.randrange(5))}


def mutated(value: Any, draw: random.Random) -> Any:
    """A value with a part of it replaced, left out, doubled or wrapped."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key, found = draw.choice(list(value)), dict(value)
        match draw.randrange(6):
            case 0:
                del found[key]
            case 1:
                found[draw.choice(KEYS)] = found.pop(key)
            case 2:
                found[draw.choice(KEYS)] = odd(draw)
            case _:
                found[key] = mutated(found[key], draw)
        return found
    if isinstance(value, list) and value and draw.random() < 0.8:
        place, found = draw.randrange(len(value)), list(value)
        match draw.randrange(5):
            case 0:
                del found[place]
            case 1:
                found.insert(place, found[place])
            case 2:
                found.insert(place, odd(draw))
            case _:
                found[place] = mutated(found[place], draw)
        return found
    match draw.randrange(4):
        case 0 if isinstance(value, str):
            place = draw.randrange(len(value) + 1)
            return value[:place] + draw.choice(ODD_TEXTS) + value[place:]
        case 1:
            return [value] * draw.choice((1, 2, 50))
        case 2:
            return {draw.choice(KEYS): value}
    return odd(draw)


def images(draw: random.Random, folder: Path) -> Iterator[Callable[[], Any]]:
    """Damaged files of all formats, given as people give images."""
    import base64

    import numpy as np

    from tests.model.image_fuzz import damaged, originals
    from vora.model.fetch_image import fetch_frames, fetch_image

    known, file = originals(), folder / "image.png"
    while True:
        content = damaged(draw.choice(known), draw)
        if draw.random() < 0.1:
            content = bytes(draw.randrange(256) for _ in range(draw.randrange(64)))
        shape = [draw.choice((0, 1, 2, 3, 4, 7)) for _ in range(draw.randrange(5))]
        array = np.full(shape, draw.choice((0, 0.5, 1, 255, 256, -1, np.nan, np.inf)), draw.choice(("f4", "f8", "f2")))
        file.write_bytes(content)
        sources = (
            content, content, content, bytearray(content), str(file), {"bytes": content, "path": None},
            base64.b64encode(content).decode(), "data:image/png;base64," + base64.b64encode(content).decode(), array,
            draw.choice(ODD_TEXTS), {"url": draw.choice(ODD_TEXTS)}, odd(draw),
        )  # fmt: skip
        source, use = draw.choice(sources), draw.choice((fetch_image, fetch_image, fetch_frames))
        yield lambda: use(source)


GOOD_ROWS: tuple[dict[str, Any], ...] = (
    {"image": "red.png", "question": "what?", "answer": "red"},
    {"image": "red.png", "questions": ["what?", "how?"], "answers": ["red", "so"]},
    {"image": "red.png", "captions": ["one", "two"]},
    {"image": "red.png", "label": "cat"},
    {"image": "red.png", "sentence": "It is.", "label": True},
    {"instruction": "say", "input": "it", "output": "so", "system": "Be.", "history": [["a", "b"]]},
    {"text": "plain text"},
    {"image": "red.png", "texts": [{"user": "what?", "assistant": "red"}]},
    {"images": ["red.png", "red.png"], "conversations": [
        {"from": "human", "value": "<image><image>what?"}, {"from": "gpt", "value": "red"}]},
    {"messages": [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": [{"type": "image", "image": "red.png"}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}], "weight": 1}]},
)  # fmt: skip


def rows(draw: random.Random, folder: Path) -> Iterator[Callable[[], Any]]:
    """Mutated rows of all layouts, in damaged files of all kinds, as training and evaluation read them."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.data.test_readers import write_tar
    from tests.model.image_fuzz import damaged
    from vora.data.packing import tokenize_sample
    from vora.data.readers import load_source
    from vora.eval.rows import Data, Rows, SkippedRows

    processor = tiny_processor(folder)
    red = (folder / "red.png").read_bytes()

    def table_bytes(values: list[dict[str, Any]], kind: str) -> bytes:
        file = folder / f"t.{kind}"
        texts = [{str(k): json.dumps(v, default=repr).encode(errors="replace").decode() for k, v in row.items()}
                 for row in values]  # fmt: skip
        table = pa.Table.from_pylist(texts if any(texts) else [{"text": "a"}])
        if kind == "parquet":
            pq.write_table(table, file, row_group_size=2)
        else:
            datasets.Dataset(table).save_to_disk(folder / "saved")
            return next((folder / "saved").glob("*.arrow")).read_bytes()
        return file.read_bytes()

    def read(file: Path) -> None:
        try:
            source = load_source(str(file))
        except ValueError as error:
            check_line(error)
            raise
        for number in range(min(len(source), 40)):
            try:
                sample = source[number]
                tokenize_sample(sample, processor, sample.conversations)
            except ValueError as error:
                check_line(error)
        for row in Rows(Data([file])).read(SkippedRows()):
            try:
                row.images()
            except ValueError as error:
                check_line(error)

    while True:
        values = [mutated(draw.choice(GOOD_ROWS), draw) for _ in range(draw.randint(1, 6))]
        values = [mutated(one, draw) if draw.random() < 0.5 else one for one in values]
        values = [one if isinstance(one, dict) else {"text": one} for one in values]
        kind = draw.choice(("jsonl", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "tar"))
        encoded = [json.dumps(one, default=repr).encode() for one in [*values, draw.choice(GOOD_ROWS)]]
        if kind == "jsonl":
            content = b"\n".join(encoded)
        elif kind == "json":
            content = b"[" + b",".join(encoded) + b"]"
        elif kind in ("csv", "tsv"):
            names = list(values[0]) or ["text"]
            mark = "," if kind == "csv" else "\t"
            lines = [mark.join(json.dumps(str(name)) for name in names)]
            lines += [mark.join(json.dumps(one.get(name), default=repr) for name in names) for one in values]
            content = "\n".join(lines).encode(errors="surrogateescape") if is_writable(lines) else b"\xff"
        elif kind == "tar":
            members = {"0.png": red, "0.txt": b"a", "1.json": encoded[0], "1.jpg": red, "2.txt": encoded[-1]}
            content = write_tar(folder / "w.tar", members).read_bytes()
        else:
            content = table_bytes(values, kind)
        if draw.random() < 0.5:
            content = damaged(content, draw) or b"\0"
        file = folder / f"data.{kind}"
        file.write_bytes(content)
        yield lambda: read(file)


def is_writable(lines: list[str]) -> bool:
    return all(not "\ud800" <= letter <= "\udfff" or "\udc80" <= letter <= "\udcff" for one in lines for letter in one)


def recipes(draw: random.Random, folder: Path) -> Iterator[Callable[[], Any]]:
    """Recipes of the repository, mutated as values and as text."""
    from vora.train.from_recipe import check_recipe, training_arguments
    from vora.train.recipe import load_recipe

    known = [path.read_text() for path in sorted(Path("recipes").glob("*/*.yaml"))]
    file = folder / "recipe.yaml"

    def load() -> None:
        recipe = load_recipe(file)
        check_recipe(recipe)
        training_arguments(recipe, folder / "out")

    while True:
        text = draw.choice(known)
        match draw.randrange(4):
            case 0:
                lines = text.splitlines()
                for _ in range(draw.randint(1, 3)):
                    place = draw.randrange(len(lines))
                    longer = [lines[place] + draw.choice(ODD_ENDS)]
                    lines[place : place + 1] = draw.choice(([], [lines[place]] * 2, longer))
                text = "\n".join(lines) or "a: 1"
            case 1:
                text = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
                    f"{chr(97 + n)}: &{chr(97 + n)} [{', '.join([f'*{chr(96 + n)}'] * 9)}]\n" for n in range(1, 12)
                ) + draw.choice((text, "data: {sources: *l}\nmodel: *l\n", "training: {max_steps: *l}\n"))  # fmt: skip
            case _:
                values = yaml.safe_load(text)
                for _ in range(draw.randint(1, 4)):
                    values = mutated(values, draw)
                text = yaml.safe_dump(values) if is_plain(values) else "{" * draw.randrange(2000)
        file.write_text(text, errors="replace")
        yield load


def is_plain(values: Any) -> bool:
    return "\\ud" not in json.dumps(values, default=repr)


def messages(draw: random.Random, folder: Path) -> Iterator[Callable[[], Any]]:
    """Mutated conversations, as chat, API and training give them to the processor."""
    processor = tiny_processor(folder)
    good = [row["messages"] for row in GOOD_ROWS if "messages" in row]
    good[0][1]["content"][0]["image"] = str(folder / "red.png")
    good.append([{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}])

    def ask(said: Any) -> None:
        processor.apply_chat_template(
            said, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )

    def learn(said: Any) -> None:
        processor.training_samples(said)

    while True:
        said = draw.choice(good)
        for _ in range(draw.randint(1, 3)):
            said = mutated(said, draw)
        use = draw.choice((ask, learn))
        yield lambda: use(said)


def tiny_processor(folder: Path) -> Any:
    """Of a tiny LLM, with a small red image beside it."""
    from PIL import Image

    import vora
    from tests.tiny import save_tiny_llm

    Image.new("RGB", (12, 12), "red").save(folder / "red.png")
    return vora.VoraProcessor.from_llm(save_tiny_llm(folder / "llm"), patch_size=4, image_size=12)


def check_line(error: ValueError) -> None:
    if type(error) is not ValueError or not str(error) or "\n" in str(error).strip():
        raise AssertionError(f"{type(error).__name__}, not one line: {error!r}") from error


KINDS = {"images": images, "rows": rows, "recipes": recipes, "messages": messages}


class TooLong(BaseException):
    """An input took more than its seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("count", type=int)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--trace", action="store_true", help="end at the first failure, with its traceback")
    given = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path[:0] = [".", "tests", "tests/data"]
    watch, seen = [False], list[str]()
    sys.addaudithook(
        lambda event, args: seen.append(f"{event} {args!r:.200}") if watch[0] and event in FORBIDDEN else None
    )
    signal.signal(signal.SIGVTALRM, lambda *_: (_ for _ in ()).throw(TooLong()))
    outcomes, causes, failures, slowest = Counter[str](), Counter[str](), Counter[str](), (0.0, 0)
    with tempfile.TemporaryDirectory() as folder:
        cases = KINDS[given.kind](random.Random(given.seed), Path(folder))
        first = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform == "linux":
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(
                resource.RLIMIT_AS, (size + MEMORY + (2 << 30), resource.RLIM_INFINITY)
            )  # with libraries
        for number in range(given.count):
            case, start = next(cases), time.process_time()
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            watch[0] = True
            try:
                case()
                outcomes["read"] += 1
            except ValueError as error:
                outcomes["refused"] += 1
                causes[str(error)[:40]] += 1
                try:
                    check_line(error)
                except AssertionError as wrong:
                    failures[f"{number}: {str(wrong)[:300]}"] += 1
            except (Exception, TooLong) as error:
                if given.trace:
                    raise
                failures[f"{number}: {type(error).__name__}: {str(error)[:300]}"] += 1
            finally:
                watch[0] = False
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            if seen:
                failures[f"{number}: {seen[0]}"] += 1
                seen.clear()
            slowest = max(slowest, (time.process_time() - start, number))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - first) / 1024
    if peak > MEMORY >> 20:
        failures[f"{peak:.0f} MB above the start"] += 1
    print(
        f"{given.kind}, seed {given.seed}: {dict(outcomes)}, {len(failures)} failures, {len(causes)} causes; "
        f"slowest {slowest[0]:.1f} s (input {slowest[1]}); {peak:.0f} MB above the start"
    )
    for failure in list(failures)[:20]:
        print("  failed:", failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
