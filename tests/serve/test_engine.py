"""A conversation: who stops listening stops the model, and images are what they are."""

import io
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console
from tiny import command_line

from vora.checkpoint import load_model
from vora.model.fetch_image import is_animated
from vora.serve import terminal
from vora.serve.chat import Chat
from vora.serve.engine import Engine
from vora.serve.terminal import open_image


@pytest.mark.parametrize(("pieces", "is_said"), [([], True), ([" ", "\n"], True), (["a", " "], False)])
def test_an_empty_answer_is_said_to_be_one(pieces, is_said, capsys):
    terminal.print_answer(SimpleNamespace(ask=lambda question, images: iter(pieces)), "what?", [])
    said = capsys.readouterr()
    assert said.out == "".join(pieces) + "\n" and ("The answer is empty" in said.err) is is_said


@pytest.mark.parametrize("leave", ["close", "raise"])
def test_a_model_that_nobody_listens_to_stops(model_folder, leave):
    model, processor = load_model(str(model_folder))
    model.generation_config.eos_token_id = None
    steps = []
    model.model.register_forward_hook(lambda *_: (steps.append(1), time.sleep(0.01)) and None)
    conversation = Chat(Engine(model, processor), max_new_tokens=100)
    others, answer = threading.active_count(), conversation.ask("what colour?")
    next(answer)
    if leave == "close":
        answer.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
    for _ in range(100):
        if threading.active_count() == others:
            break
        time.sleep(0.05)
    made = len(steps)
    assert made < 60 and threading.active_count() == others
    time.sleep(0.05)
    assert len(steps) == made and conversation.messages == []


def test_the_command_takes_animations_whole_and_refuses_bombs(tmp_path, monkeypatch):
    for name in ("photo.mpo", "scan.tif", "a.gif", "a.webp", "a.png"):
        first, *rest = (Image.effect_noise((32, 32), 50).convert("RGB") for _ in range(3))
        first.save(tmp_path / name, save_all=True, append_images=rest)
    (tmp_path / "photo.mpo").rename(tmp_path / "photo.jpg")
    for name in ("photo.jpg", "scan.tif"):  # previews and pages
        assert open_image(str(tmp_path / name)).size == (32, 32)
    for name in ("a.gif", "a.webp", "a.png"):
        assert is_animated(tmp_path / name) and is_animated(f"file://{tmp_path / name}")
        assert len(open_image(str(tmp_path / name)).frames) == 3
    whole = (tmp_path / "a.gif").read_bytes()
    for end in range(len(whole) // 2, len(whole), 97):
        (tmp_path / "cut.gif").write_bytes(whole[:end])
        assert is_animated(tmp_path / "cut.gif") in (True, False)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # what cannot be read is no animation
    with pytest.raises(ValueError, match="Cannot read image .*a.gif: Image size .* decompression bomb"):
        open_image(str(tmp_path / "a.gif"))


def test_a_refused_question_or_image_does_not_end_the_chat(model_folder, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    Image.new("RGB", (99, 99)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    long = " ".join(["what?"] * 300)  # longer than the LLM's context
    lines = ["what is <reponame>?", f"/image {tmp_path}/bomb.png", f"/image {tmp_path}/red.png", long, "what?", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    asked, print_answer = [], terminal.print_answer

    def spy(chat, question, images):
        asked.append((question, len(images), len(chat.messages)))
        print_answer(chat, question, images)

    monkeypatch.setattr(terminal, "print_answer", spy)
    chat = Chat(Engine(*load_model(str(model_folder))), max_new_tokens=2)
    terminal.converse(chat, [], Console(stderr=True))
    assert asked == [("what is <reponame>?", 0, 0), (long.strip(), 1, 2), ("what?", 0, 2)]
    shown = " ".join(capsys.readouterr().err.split())
    assert "1 images were left out with that question" in shown
    assert "decompression bomb" in shown and "LLM's context holds 256: start a new chat" in shown
    assert "No image was given, so the answer is from the text alone" in shown


def test_commands_of_the_chat(model_folder, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a red.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = [f"'{tmp_path}/a red.png'", f"{tmp_path}/a\\ red.png", "~/a red.png"]
    lines = [*(f"/image {path}" for path in paths), "what?", "/help", "/imgae x", "/image", "/clear", "what?", ""]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat = Chat(Engine(*load_model(str(model_folder))), max_new_tokens=2)
    terminal.converse(chat, [], Console(stderr=True, width=300))
    shown = capsys.readouterr().err.splitlines()
    assert "Images of the next question: 3." in shown
    assert chat.num_images == 0 and len(chat.messages) == 2  # of the second conversation
    assert sum("/clear forgets" in line for line in shown) == 4 and any("/imgae is unknown" in line for line in shown)
    said = [number for number, line in enumerate(shown) if "No image was given" in line]
    assert len(said) == 1 and said[0] > shown.index("A new conversation, without images.")


def test_a_chat_says_with_how_many_images_the_model_was_trained(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\n\n"))
    chat = Chat(Engine(*load_model(str(model_folder))), max_new_tokens=2)
    terminal.converse(chat, [Image.new("RGB", (4, 4))] * 2, Console(stderr=True, width=300), trained_with=1)
    assert "2 images, and the model was trained with at most 1 image in a sample" in capsys.readouterr().err
    assert "trained with up to 4" in terminal.several_images(3, 4)
    assert terminal.several_images(1, 1) is None and terminal.several_images(2, None) is None


def test_an_answer_that_is_stopped_ends_nothing(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("what?\nwhat?\n\n"))
    chat, asked = Chat(Engine(*load_model(str(model_folder)))), []

    def stopped(chat, question, images):
        asked.append(question)
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "print_answer", stopped)
    terminal.converse(chat, [], Console(stderr=True))
    assert len(asked) == 2 and "Stopped" in capsys.readouterr().err


def test_what_a_generation_config_has_against_repetition_holds_as_in_generate(model_folder):
    model, processor = load_model(str(model_folder))
    messages = [{"role": "user", "content": "what colour?"}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answers = []
    for penalties in ({}, {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}):
        model.generation_config.update(eos_token_id=None, **{"repetition_penalty": None, **penalties})
        wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append("".join(Engine(model, processor).submit(messages, max_new_tokens=12)))
        assert answers[-1] == processor.decode(wanted, skip_special_tokens=True)
    assert len(set(answers)) == 3


def test_an_id_that_the_vocabulary_lacks_is_suppressed_without_harm(model_folder):
    model, processor = load_model(str(model_folder))
    messages = [{"role": "user", "content": "what colour?"}]
    wanted = "".join(Engine(model, processor).submit(messages, max_new_tokens=4))
    model.generation_config.suppress_tokens = [10**6, -3]
    assert "".join(Engine(model, processor).submit(messages, max_new_tokens=4)) == wanted


def test_whoever_waits_hears_that_the_engine_cannot_begin(model_folder, monkeypatch):
    engine, messages = Engine(*load_model(str(model_folder))), [{"role": "user", "content": "what colour?"}]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_suppressed", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            "".join(engine.submit(messages, max_new_tokens=4))
    assert isinstance("".join(engine.submit(messages, max_new_tokens=4)), str)  # and goes on with the next


@pytest.mark.parametrize("heard", ["answer = ''.join(answer)", "next(answer)"])
def test_the_interpreter_waits_for_the_thread_that_generates(model_folder, heard):
    """Which still lets go of a cache when the answer is there, or goes on with one that nobody listens to."""
    code = f"""
import atexit, sys, time
from vora.checkpoint import load_model
from vora.serve import engine as module
from vora.serve.batch import Batch
class Slow(Batch):
    def __del__(self):
        time.sleep(0.5)
module.Batch = Slow
engine = module.Engine(*load_model(sys.argv[1]))
engine.model.generation_config.eos_token_id = None
answer = engine.submit([dict(role="user", content="what?")], max_new_tokens=200 if "next" in {heard!r} else 3)
{heard}
worker = engine._worker
assert worker.is_alive()
atexit._run_exitfuncs()
print(worker.is_alive())
"""
    done = command_line(model_folder, code=code)
    assert done.returncode == 0 and done.stdout == "False\n", done.stderr
