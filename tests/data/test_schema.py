"""Rows of any layout become the same samples, and broken ones say what is wrong."""

import base64
import io
import json
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from vora.data.columns import RowOptions
from vora.data.packing import tokenize_sample
from vora.data.prompts import Prompts
from vora.data.schema import to_sample

LAYOUTS = Path(__file__).parent / "layouts"
RED, BLUE = (255, 0, 0), (0, 0, 255)
RED_PNG = (LAYOUTS / "images" / "red.png").read_bytes()
RED_BASE64 = base64.b64encode(RED_PNG).decode()
TELL = Prompts(("Tell.",), ("Which?",), ("So: {}",))


def content_of(sample):
    """(colours of a sample's images, a list for a video; its conversations as "user: |what? / assistant: x", | for an
    image)."""

    def colour(image):
        return [colour(frame) for frame in image] if isinstance(image, list) else image.getpixel((0, 0))

    def text(content):
        return content if isinstance(content, str) else "".join(part.get("text", "|") for part in content)

    opened = sample.open_images()
    conversations = [one if one[0]["role"] == "text" else sample.messages(opened, one) for one in sample.conversations]
    said = [" / ".join(f"{message['role']}: {text(message['content'])}" for message in one) for one in conversations]
    return [colour(image) for image in opened], said


def read(row, folder=LAYOUTS / "images", **options):
    """The content of a row's sample."""
    return content_of(to_sample(row, "f:0", folder, RowOptions(TELL, **options)))


def turns(*said):
    """Messages of a user and an assistant in turn."""
    return [{"role": "assistant" if place % 2 else "user", "content": text} for place, text in enumerate(said)]


@pytest.fixture
def folder(tmp_path):
    """Two images and an animation of both."""
    for colour in ("red", "blue"):
        shutil.copy(LAYOUTS / "images" / f"{colour}.png", tmp_path)
    frames = [Image.open(tmp_path / f"{colour}.png") for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.png", save_all=True, append_images=frames[1:])
    return tmp_path


GOOD = {"question": "what?", "answer": "x"}
GIVEN, ALONE = "user: |what? / assistant: x", "user: what? / assistant: x"
FILM = [[RED, BLUE]]


@pytest.mark.parametrize(
    ("row", "images", "conversation"),
    [
        ({"image": "red.png", "question": "<image>\nwhat?", "answer": 3}, [RED], "user: |what? / assistant: 3"),
        ({"image": "red.png", "question": "what?", "answers": ["a", "x", "x"]}, [RED], GIVEN),
        ({"question": "what?", "answers": [{"answer": "x"}, {"answer": "x"}, {"answer": "a"}]}, [], ALONE),
        ({"question": "what?", "answers": {"answer": ["x", "x", "blue"], "answer_id": [1, 2, 3]}}, [], ALONE),
        ({"image": "", "conversations": [{"from": "gpt", "value": "Hi!"}, {"from": "human", "value": "a <video> tag?"},
                                         {"from": "gpt", "value": "<video>"}]}, [],
         "user: a <video> tag? / assistant: <video>"),
        ({"conversations": {"from": ["human", "gpt"], "value": ["what?", "x"]}}, [], ALONE),
        ({"conversations": json.dumps([{"from": "human", "value": "what?"}, {"from": "gpt", "value": "x"}])}, [],
         ALONE),
        ({"messages": turns([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{RED_BASE64}"}},
                             {"type": "text", "text": "what?", "image": None}], "x")}, [RED], GIVEN),
        ({"messages": turns([{"type": "image", "base64": RED_BASE64}, {"type": "input_text", "text": "what?"}],
                            [{"type": "output_text", "text": "x"}])}, [RED], GIVEN),
        ({"messages": turns([{"type": "image", "image": "red.png"}, {"type": "text", "text": "what?"}], "x"),
          "image_path": "red.png", "file_name": "red.png"}, [RED], GIVEN),  # images in messages need no column
        ({"image": RED_BASE64, **GOOD}, [RED], GIVEN),
        ({"video": ["red.png", "blue.png"], **GOOD}, FILM, GIVEN),
        ({"messages": turns([{"type": "video", "video": ["red.png", "blue.png"]}, {"type": "text", "text": "what?"}],
                            "x")}, FILM, GIVEN),
        ({"video": "film.png", "question": "<video>what?", "answer": "x"}, FILM, GIVEN),
        ({"videos": ["film.png", ["red.png"]], "question": "<video><video>what?", "answer": "x"},
         [[RED, BLUE], [RED]], "user: ||what? / assistant: x"),
        ({"system": "Be brief.", "history": [["a?", "b"]], "instruction": "what?", "input": "now", "output": "x"}, [],
         "system: Be brief. / user: a? / assistant: b / user: what?\nnow / assistant: x"),
        ({"system": "Be brief.", "messages": turns("what?", "x")}, [], f"system: Be brief. / {ALONE}"),
        ({"history": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}], **GOOD}, [],
         f"user: a? / assistant: b / {ALONE}"),
        ({"history": "[]", "system": "Be brief.", "image": "red.png", "caption": "x"}, [RED],
         "system: Be brief. / user: |Tell. / assistant: x"),
        ({"messages": [{"role": "developer", "content": "Be brief."}, *turns("what?", "x")]}, [],
         f"system: Be brief. / {ALONE}"),
        # as Qwen-VL and DashScope have them
        ({"conversations": [{"from": "user", "value": "Picture 1: <img>red.png</img>\nwhat?"},
                            {"from": "assistant", "value": "<img>x</img>"}]}, [RED],
         "user: Picture 1: |\nwhat? / assistant: <img>x</img>"),
        ({"messages": turns([{"image": "red.png"}, {"text": "what?"}], [{"text": "x"}])}, [RED], GIVEN),
        # what `datasets` gives back: all keys, null where there was nothing
        ({"messages": [{"role": "system", "content": None, "tool_calls": None},
                       {"role": "user", "content": [{"type": "image", "image": {"bytes": None, "path": None},
                                                     "text": None, "image_url": {"url": "red.png", "detail": None}},
                                                    {"type": "text", "text": "what?", "image": None}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "x"}], "tool_calls": [],
                        "function_call": {"name": None, "arguments": None}, "weight": None}],
          "tools": [{"name": None}], "functions": "null"}, [RED], GIVEN),
        ({"image": bytearray(RED_PNG), **GOOD}, [RED], GIVEN),
        ({"image": {"bytes": memoryview(RED_PNG), "path": "x.png"}, **GOOD}, [RED], GIVEN),
        ({"questions": ["a?", "b?"], "answers": ["", "yes"], "captions": []}, [], "user: b? / assistant: yes"),
        ({"image": "red.png", "captions": ["good", None, " "], "messages": [], "label": math.nan}, [RED],
         "user: |Tell. / assistant: good"),
        ({"question": "how many?", "answer": 3.0, "audio": None, "videos": []}, [], "user: how many? / assistant: 3"),
        ({"image": "red.png", "label": "tabby cat"}, [RED], "user: |Which? / assistant: tabby cat"),
        ({"image": "red.png", "sentence": "It is {r}.", "label": True}, [RED],
         "user: |So: It is {r}. / assistant: true"),
        ({"image": "red.png", "statement": "No.", "label": 0}, [RED], "user: |So: No. / assistant: false"),
        ({"file_name": "blue.png", "text": "a sky"}, [BLUE], "user: |Tell. / assistant: a sky"),
        ({"text": "a", "image_id": 3, "file_name": "a.py", "url": "http://x.org/a.png", "video": None}, [], "text: a"),
        ({"text": "a", "file_name": "scan1.png", "video_url": "https://x.org/v/1", "image_license": "https://x.org"},
         [], "text: a"),  # names what is not there
        # answers beside choices
        ({"question": "Q? A. x B. y", "choices": ["x", "y"], "answer": "A"}, [], "user: Q? A. x B. y / assistant: A"),
        ({"question": "what?", "choices": [1.0, 2.0], "answer": 2.0}, [], "user: what? / assistant: 2"),
        ({"question": "what?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answer": "x"}, [], ALONE),
        ({"question": "what?", "options": "[]", "answer": "x"}, [], ALONE),
        ({"question": "what?", "choices": ["X", "no"], "answer": "x"}, [], ALONE),
        ({"question": "what?", "choices": ["x", "y"], "answers": ["x", None, "x"]}, [], ALONE),
        ({"question": "what?", "choices": ["x", "A, B"], "answer": "A, B"}, [], "user: what? / assistant: A, B"),
        ({"question": "what?", "choices": ["one", "two"], "answers": ["2", "2"]}, [], "user: what? / assistant: 2"),
        ({"question": "what?", "choices": ["an ox", "x"], "answer": "BA"}, [], "user: what? / assistant: BA"),
        ({"question": "which? A: x B: y", "A": "x", "B": "y", "answer": "B"}, [],
         "user: which? A: x B: y / assistant: B"),
        ({"context": "A. cat B. dog", "question": "which?", "choices": ["cat", "dog"], "answer": "A"}, [],
         "user: A. cat B. dog\nwhich? / assistant: A"),
        ({"question": "how many? (A) 1 (B) 2", "A": 1, "B": 2, "answer": "B"}, [],
         "user: how many? (A) 1 (B) 2 / assistant: B"),
        ({"question": "how many?", "A": 0.5, "answer": "3"}, [], "user: how many? / assistant: 3"),
        ({"question": "what?", "options": "any", "answer": "x"}, [], ALONE),
        # what is read before it is asked about: of SQuAD, of PubMedQA, of HotpotQA, of Dolly
        ({"context": ["It is", "x."], **GOOD}, [], "user: It is\nx.\nwhat? / assistant: x"),
        ({"context": {"contexts": ["It is", None, "x."], "labels": ["A", "B", "C"]}, **GOOD}, [],
         "user: It is\nx.\nwhat? / assistant: x"),
        ({"context": {"title": ["T"], "sentences": [["It is", "x."]]}, **GOOD}, [],
         "user: It is\nx.\nwhat? / assistant: x"),
        ({"context": "It is x.", **GOOD}, [], "user: It is x.\nwhat? / assistant: x"),
        ({"instruction": "what?", "context": "It is x.", "output": "x"}, [],
         "user: what?\nIt is x. / assistant: x"),
        ({"instruction": "what?", "context": "", "output": "x <tool_call> y"}, [],
         "user: what? / assistant: x <tool_call> y"),
    ],
)  # fmt: skip
def test_rows_as_people_have_them(folder, row, images, conversation):
    found, conversations = read(row, folder)
    assert (found, conversations[0]) == (images, conversation)


@pytest.mark.parametrize("answer", ["A", "a", "A:", "[A]", "(A)", "Option A", "answer: A"])
@pytest.mark.parametrize(
    "options",
    [
        ["cat", "dog"], {"A": "cat", "B": "dog"}, "A. cat\nB. dog", "(A) cat (B) dog", '["cat", "dog"]',
        "(a) cat (b) dog", "a) cat b) dog", "a. cat b. dog", "1) cat 2) dog", "(1) cat (2) dog", "1. cat 2. dog",
        "['cat', 'dog']", '{"A": "cat", "B": "dog"}', [{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}],
    ],
)  # fmt: skip
def test_letters_of_choices_that_are_not_shown_are_refused(folder, options, answer):
    row = {"question": "which?", "options": options}
    with pytest.raises(ValueError, match="is none of its 2 choices"):
        read({**row, "answer": answer}, folder)
    assert read({**row, "answer": "cat"}, folder)[1][0] == "user: which? / assistant: cat"
    shown = {**row, "question": "which? A. cat B. dog", "answer": answer}
    assert read(shown, folder)[1][0].endswith(f"assistant: {answer}")


NOTHING, UNREAD = "answer is empty", "which is not understood"


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"image": "red.png", "question": "what?", "answer": " "}, NOTHING),
        ({"questions": ["what?"], "answers": [None]}, NOTHING),
        ({"question": "what?", "answer": math.nan}, "fit no layout"),
        ({"question": math.nan, "answer": "x"}, "fit no layout"),
        ({"questions": ["what?", math.nan], "answers": ["a", "b"]}, "question is null"),
        ({"question": "what?", "answers": ["a", "b"], "questions": ["what?"]}, "1 questions, but 2 answers"),
        ({"question": "which?", "choices": ["this", "that"], "answer": 1}, "answer 1 is none of its 2 choices"),
        ({"question": "which?", "choices": ["this", "that"], "answer": "B"}, "answer 'B' is none of its 2 choices"),
        ({"question": "which?", "A": "this", "B": "that", "answer": "B"}, "answer 'B' is none of its 2 choices"),
        ({"question": "in 1234?", "A": 1, "B": 2, "C": 3, "D": 4, "answer": "B"}, "'B' is none of its 4 choices"),
        ({"question": "which?", "a": "cat", "b": "dog", "answer": "a"}, "answer 'a' is none of its 2 choices"),
        ({"question": "Q?", "choices": ["x", "y"], "answers": ["A", "A"]}, "answer 'A' is none of its 2 choices"),
        ({"question": "Q?", "choices": ["x", "y"], "answers": ["x", "(b)"]}, r"answer '\(b\)' is none of its 2 "),
        ({"question": "Q?", "choices": ["x", "y", "z"], "answer": "A, C"}, "answer 'A, C' is none of its 3 choices"),
        ({"question": "Q?", "A": "x", "B": "y", "answer": "Options A and B"}, "'Options A and B' is none of its 2"),
        ({"question": "Q?", "choices": ["x", "y", "z"], "answer": "ABC"}, "answer 'ABC' is none of its 3 choices"),
        ({"question": "Q?", "choices": [1, 2, 3], "answer": "0; 2"}, "answer '0; 2' is none of its 3 choices"),
        ({"context": {"facts": 3}, **GOOD}, r"context is a dict, not text. .* columns: \{id: context\}"),
        ({"messages": turns("x", '<tool_call>\n{"name": "f"}\n</tool_call>')}, f"a tool, <tool_call>, {UNREAD}"),
        ({"question": "is it \ud83d?", "answer": "x"}, r"holds '\\ud83d', half of a surrogate pair, at place 6"),
        ({"messages": turns("what?", "\udc00")}, "column 'messages' holds .* half of a surrogate pair"),
        ({"conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "x"}]}, "1 places"),
        ({"image": ["red.png"] * 3, "messages": turns("<image><image>", "x")}, "2 places .* 3 images"),
        ({"image": "no.png", **GOOD}, "no.png.*no such file"),
        ({"image": "x" * 240 + ".png", **GOOD}, "no such file"),
        ({"image": {"bytes": None, "path": None}, "caption": "x"}, "images is empty"),
        ({"image": "https://example.org/a.png", **GOOD}, "(URLs|URL,) .*data.allow_urls"),
        ({"caption": "a dog", "image": None}, "a caption, but no image"),
        ({"image": "red.png", "label": 3}, "label 3 is a number"),
        ({"image": "red.png", "sentence": "a", "label": "maybe"}, "neither true nor false"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "Who is 'robot'"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "no answer"),
        ({"messages": turns("x")}, "no answer"),
        # an assistant that says nothing
        ({"messages": turns("x", "")}, NOTHING),
        ({"messages": turns("x", "y", "z", " ")}, NOTHING),
        ({"messages": turns("x", [{"type": "text", "text": ""}])}, NOTHING),
        ({"messages": turns("x", None)}, NOTHING),
        ({"messages": turns("x", "<think>\n\n</think>\n\n")}, NOTHING),
        ({"messages": [*turns("x"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, UNREAD),
        ({"messages": turns("x", "y"), "tools": '[{"name": "f"}]'}, f"column 'tools' .* {UNREAD}"),
        ({"instruction": "x", "output": "y", "functions": [{"name": "f"}]}, f"column 'functions' .* {UNREAD}"),
        ({**GOOD, "chat_template_kwargs": {"enable_thinking": False}}, f"'chat_template_kwargs' .* {UNREAD}"),
        ({"messages": [*turns("x"), {"role": "assistant", "content": "y", "reasoning_content": "hm"}]},
         f"assistant has 'reasoning_content', {UNREAD}"),
        ({"messages": [{"role": "user", "content": "x", "images": ["red.png"]}, *turns("x", "y")[1:]]},
         f"user has 'images', {UNREAD}"),
        ({"messages": turns(None, "y")}, "user says nothing"),
        ({"messages": turns([{"type": "image", "image": ["red.png", "blue.png"]}], "y")}, "2 images: one part"),
        ({"messages": turns("x", "y"), "label": False}, "not wanted"),
        ({"instruction": "x", "output": "y", "kto_tag": False}, "not wanted"),
        ({"image": "red.png", "messages": turns("Where is <ref-object>?", "<bbox>"), "objects": {"bbox": [[1, 2]]}},
         "places for 'objects'"),
        ({"text": "a", "system": "Be brief."}, "text is no conversation"),
        ({"messages": turns("x", "y"), "loss_mask": [1]}, "weighs 1 turns, but it has 2"),
        ({"messages": turns("x", "y"), "weight": 0.5}, "weighed by weight 0.5"),
        # parts of other kinds
        ({"messages": turns([{"type": "text", "text": "x"}, {"type": "audio", "audio": "a.wav"}], "y")},
         f"user says a part of type 'audio', {UNREAD}"),
        ({"image": "red.png", "messages": turns("x", [{"type": "tool_use", "id": 1}])}, f"'tool_use', {UNREAD}"),
        ({"messages": turns("x", [{"type": "image", "image": "red.png"}])}, f"assistant says .* 'image', {UNREAD}"),
        # videos and sound
        ({"videos": ["clip.mp4"], "messages": turns("<video>what?", "x")}, "Cannot read video .*clip.mp4"),
        ({"messages": turns("<video>\nwhat?", "x")}, "a place for video, <video>, but none"),
        ({"image": "red.png", "messages": turns("Listen.\n<audio>", "x")}, "a place for audio"),
        ({"audios": ["a.wav"], "messages": turns("<audio>what?", "x")}, "column 'audios' holds sound"),
        ({"audio": {"bytes": b"RIFF", "path": None}, **GOOD}, "column 'audio' holds sound"),
        ({"image": "red.png", "video": "film.png", **GOOD}, "images in 'image' and a video in 'video'"),
        ({"video_path": "clip.mp4", **GOOD}, "column 'video_path' seems to hold"),
        # what stands before
        ({"history": ["a", "b"], "instruction": "what?", "output": "x"}, "history is no list of pairs"),
        ({"history": [["a", ""]], "instruction": "what?", "output": "x"}, NOTHING),
        ({"system": "a", "messages": [{"role": "system", "content": "b"}, *turns("x", "y")]}, "system's text"),
        ({"messages": [*turns("x"), {"role": "assistant", "content": "y", "weight": 0.5}]}, "weighed by weight 0.5"),
    ],
)  # fmt: skip
def test_bad_rows_say_why(folder, row, cause):
    with pytest.raises(ValueError, match=cause):
        read(row, folder)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"loss": False}, {"loss_mask": 0}, {"train": False, "weight": None}, {"training": False}]
)
def test_marked_turns_are_read_but_not_learned(processor, mark):
    said = turns("one?", "no", "two?", "yes")
    said[0] |= mark
    said[1] |= mark
    said[3] |= dict.fromkeys(mark, 1)
    sample = to_sample({"messages": said})
    found = tokenize_sample(sample, processor, sample.conversations)
    assert processor.tokenizer.decode(found["targets"][found["targets"] != -100]) == "yes<|im_end|>"
    assert "no<|im_end|>" in processor.tokenizer.decode(found["input_ids"])
    for columns in ({"loss_mask": [0, 0, 0, 1]}, {"weights": [0, 0, 0, 1], "weight": None}):
        sample = to_sample({"messages": turns("one?", "no", "two?", "yes")} | columns)
        assert [message.get("learn", True) for message in sample.conversations[0]] == [True, False, True, True]
    masked = [{"role": "assistant", "content": "y", "masked": is_masked} for is_masked in (True, False)]
    conversation = to_sample({"messages": [*turns("x"), masked[0], *turns("x"), masked[1]]}).conversations[0]
    assert [message.get("learn", True) for message in conversation] == [True, False, True, True]


def test_bytes_and_addresses_are_images_and_videos(folder):
    film = (folder / "film.png").read_bytes()
    others = bytearray(film), {"bytes": memoryview(film)}, io.BytesIO(film), Image.open(folder / "film.png")
    for video in (film, [film], {"bytes": film, "path": None}, f"file://{folder}/film.png", *others):
        assert read({"video": video, "caption": "x"}, folder / "elsewhere")[0] == FILM
    for video in (film, {"bytes": film, "path": None}, {"url": f"{folder}/film.png"}):
        assert read({"messages": turns([{"type": "video", "video": video}], "x")}, folder / "elsewhere")[0] == FILM
    assert read({"image": f"file://{folder}/red.png", **GOOD}, folder / "elsewhere")[0] == [RED]
    with pytest.raises(ValueError, match="127.0.0.1 is at .* private"):  # URLs only if asked for, and not even so all
        read({"image": "http://127.0.0.1:9/a.png", **GOOD}, allow_urls=True)


@pytest.mark.parametrize(
    ("row", "columns", "wanted"),
    [
        ({"image": "red.png", "messages": turns("q", "a"), "recap": "a red one", "caption": "raw"},
         {"caption": "recap"}, "user: |Tell. / assistant: a red one"),
        ({"question": "x", "answer": "what?"}, {"question": "answer", "answer": "question"}, ALONE),
        ({"question": "what?", "answers": [{"answer": "many"}], "best": "x", "captions": ["no"]}, {"answer": "best"},
         ALONE),
        ({**GOOD, "opts": ["x", "y"]}, {"choices": "opts"}, ALONE),
        ({**GOOD, "context": {"facts": 3}}, {"id": "context"}, ALONE),  # leaves it out
    ],
)  # fmt: skip
def test_named_columns_go_before_layouts_and_synonyms(row, columns, wanted):
    assert read(row, columns=columns)[1] == [wanted]


def test_all_captions_of_an_image_share_one_prompt_and_images_differ():
    options = RowOptions(Prompts(("Tell.", "Say.", "Look.")))
    row = {"image": RED_PNG, "captions": ["A.", "B.", "C.", "D."]}
    samples = [to_sample(row, f"f:{number}", options=options) for number in range(20)]
    prompts = [{conversation[0]["content"] for conversation in sample.conversations} for sample in samples]
    assert all(len(one) == 1 for one in prompts) and set.union(*prompts) == {"Tell.", "Say.", "Look."}


def test_prompts_are_checked():
    for lists, cause in (({"caption": ()}, "0 caption"), ({"statement": ("True?",)}, "needs one")):
        with pytest.raises(ValueError, match=cause):
            Prompts(**lists)
