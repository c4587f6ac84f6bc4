"""From messages and images, good and bad, to model inputs."""

import base64
import io
import json
import math
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, processors
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from vora import VoraForConditionalGeneration, VoraImageProcessor, VoraProcessor
from vora.model.fetch_image import ImagePolicy, fetch_image
from vora.model.image_processing_vora import fit_grid

EYES = {"patch_size": 4, "image_size": 12}


@pytest.fixture(scope="module")
def processor(llm_folder):
    return VoraProcessor.from_llm(llm_folder, **EYES)


@pytest.fixture(scope="module")
def model(llm_folder):
    return VoraForConditionalGeneration.from_llm(llm_folder, **EYES)


def coloured(colour, size=(12, 12), mode="RGB"):
    return Image.new(mode, size, colour)


def user(*parts):
    """A user's message of texts (str) and images (anything else, or a path ending in .png)."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str) and not part.endswith(".png")
        else {"type": "image", "image": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": text}


def encode(processor, messages, **kwargs):
    kwargs = {"add_generation_prompt": True, "return_tensors": "pt", **kwargs}
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)


# Messages to inputs


def test_images_and_texts_become_tokens_in_order(processor, tmp_path):
    coloured("blue", (8, 8)).save(tmp_path / "blue.png")
    message = user("what?", coloured("red"), coloured("teal", (12, 4)), "and", str(tmp_path / "blue.png"))
    inputs = encode(processor, [message])
    assert inputs["image_grid_thw"].tolist() == [[1, 3, 3], [1, 1, 4], [1, 2, 2]]  # 1 x 3 is below the budget
    assert inputs["pixel_values"].shape == (17, 48)
    rendered = processor.tokenizer.decode(inputs["input_ids"][0])
    images = [processor.image_token * count for count in (9, 4, 4)]
    expected = f"what?{images[0]}{images[1]}and{images[2]}<|im_end|>\n<|im_start|>assistant\n"
    assert rendered == "<|im_start|>user\n" + expected
    images = coloured("red"), coloured("teal", (12, 4)), coloured("blue", (8, 8))
    alone = [processor.image_processor(image, return_tensors="pt")["pixel_values"] for image in images]
    assert torch.equal(inputs["pixel_values"], torch.cat(alone))


def test_batches_mix_image_and_text_rows_and_pad_left(processor, model):
    rows = [
        [user(coloured("red"), "what colour is the shape?")],
        [user("what?")],
        [{"role": "user", "content": "Is there a teal shape in the image?"}],
        [user("first", coloured("blue", (8, 8)), "second", coloured("green", (8, 8)))],
    ]
    batch = encode(processor, rows)
    mask = batch["attention_mask"]
    assert mask[:, -1].all() and (mask.diff(dim=1) >= 0).all() and not mask.all()
    with torch.no_grad():
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, position_ids=position_ids).logits
        for row, found in zip(rows, logits):
            alone = encode(processor, row)
            length = alone["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"][rows.index(row), -length:], alone["input_ids"][0])
            torch.testing.assert_close(found[-length:], model(**alone).logits[0], atol=1e-4, rtol=1e-4)
    answers = model.generate(**batch, max_new_tokens=2, suppress_tokens=[processor.image_token_id])
    assert answers.shape == (4, mask.shape[1] + 2)


def test_text_alone_has_no_pixels_and_is_what_the_llm_gets(processor):
    messages = [{"role": "user", "content": "what colour?"}]
    inputs = encode(processor, messages)
    assert set(inputs) == {"input_ids", "attention_mask"}
    own = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert inputs["input_ids"][0].tolist() == own


def test_the_budget_may_be_set_for_one_call(processor):
    messages = [user(coloured("red", (40, 40)), "what?")]
    assert encode(processor, messages)["image_grid_thw"].tolist() == [[1, 3, 3]]
    less = encode(processor, messages, processor_kwargs={"images_kwargs": {"max_image_tokens": 4}})
    assert less["image_grid_thw"].tolist() == [[1, 2, 2]]


def test_from_llm_agrees_with_the_model_on_the_image_token(processor, model):
    assert processor.image_token == "<reponame>" and processor.image_token_id == model.config.image_token_id
    assert processor.tokenizer.pad_token is not None


def test_an_llm_without_a_spare_token_grows_by_one(llm_folder, tmp_path):
    tokenizer = tiny_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str().replace("<reponame>", "<repository>"))
    backend = Tokenizer.from_str(json.dumps(vocabulary))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    base = AutoModelForCausalLM.from_pretrained(llm_folder)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    grown = VoraForConditionalGeneration.from_llm(tmp_path, **EYES)
    processor = VoraProcessor.from_llm(tmp_path, **EYES)
    size = base.config.vocab_size
    assert processor.image_token == "<image>" and processor.image_token_id == size == grown.config.image_token_id
    assert grown.config.text_config.vocab_size == grown.lm_head.weight.shape[0] == size + 1
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(grown(ids).logits[..., :size], base(ids).logits)
        grown(**encode(processor, [user(coloured("red"), "what?")]))
    grown.save_pretrained(tmp_path / "grown")
    assert VoraForConditionalGeneration.from_pretrained(tmp_path / "grown").config.image_token_id == size


# Training samples


def spoken(processor, sample):
    """The text of each run of labels."""
    labels, runs = sample["labels"], []
    for before, label in zip([-100, *labels], labels):
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(label)
    return [processor.tokenizer.decode(run) for run in runs]


CONVERSATION = [
    {"role": "system", "content": "system"},
    user(coloured("red"), "what colour is the shape?"),
    assistant("red"),
    user("Is there a circle?", coloured("blue", (8, 8))),
    assistant("no, none"),
]


def test_labels_are_the_assistants_words_and_the_end_of_turn(processor):
    sample = processor.training_sample(CONVERSATION)
    assert spoken(processor, sample) == ["red<|im_end|>", "no, none<|im_end|>"]
    learned = sample["labels"] != -100
    assert np.array_equal(sample["labels"][learned], sample["input_ids"][learned])
    assert len(sample["input_ids"]) == len(sample["labels"])
    assert sample["pixel_values"].shape == (13, 48)


def test_a_turn_ends_where_the_template_ends_it():
    """Qwen2.5's base models end texts with <|endoftext|>, and turns with <|im_end|>."""
    processor = VoraProcessor.from_llm(tiny_tokenizer(eos_token="<|endoftext|>"), **EYES)
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(processor.end_ids) == ["<|endoftext|>", "<|im_end|>"]
    assert spoken(processor, processor.training_sample(CONVERSATION)) == ["red<|im_end|>", "no, none<|im_end|>"]
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[5, 0]))
    processor.end_turns_of(model)
    assert model.generation_config.eos_token_id == sorted({5, *processor.end_ids})


def test_a_turn_that_no_special_token_ends_is_spoken_whole():
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    processor = VoraProcessor.from_llm(tiny_tokenizer(chat_template=bare), **EYES)
    assert processor.end_ids == [processor.tokenizer.eos_token_id]
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=None))
    processor.end_turns_of(model)
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("end", [" ", "\n"])
def test_a_space_is_no_end_of_turn(end):
    """SentencePiece's decoders leave spaces out, too; Llama 2's template puts one after an answer."""
    template = "{% for m in messages %}{{ ' ' + m['content'] + '" + repr(end)[1:-1] + "' + eos_token }}{% endfor %}"
    for chat_template in (template, template.replace(" + eos_token", "")):
        tokenizer = tiny_tokenizer(chat_template=chat_template, sentencepiece=True)
        processor = VoraProcessor.from_llm(tokenizer, **EYES)
        assert processor.end_ids == [tokenizer.eos_token_id]


def test_a_template_that_drops_answers_or_raises_says_nothing_of_ends():
    dropped = "{{ '<|endoftext|>' }}{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    for template in (dropped, "{{ raise_exception('no') }}"):
        processor = VoraProcessor.from_llm(tiny_tokenizer(chat_template=template), **EYES)
        assert processor.end_ids == [processor.tokenizer.eos_token_id]


@pytest.mark.parametrize("turn", [2, 4])
def test_training_follows_the_very_tokens_of_generation(processor, turn):
    sample = processor.training_sample(CONVERSATION[: turn + 1])
    inputs = encode(processor, CONVERSATION[:turn], return_tensors="np")
    length = inputs["input_ids"].shape[1]
    assert np.array_equal(sample["input_ids"][:length], inputs["input_ids"][0])
    assert sample["labels"][length] == sample["input_ids"][length]
    assert np.array_equal(sample["pixel_values"], inputs["pixel_values"])
    assert np.array_equal(sample["image_grid_thw"], inputs["image_grid_thw"])


def begin_with_bos(tokenizer):
    """Let a tokenizer put <|endoftext|> before every text, as many do."""
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )


def test_the_template_alone_writes_special_tokens():
    tokenizer = tiny_tokenizer(bos_token="<|endoftext|>")  # its chat template has none
    begin_with_bos(tokenizer)
    processor = VoraProcessor.from_llm(tokenizer, **EYES)
    messages = [user(coloured("red"), "what?"), assistant("red")]
    for ids in (encode(processor, messages[:1])["input_ids"][0], processor.training_sample(messages)["input_ids"]):
        assert processor.tokenizer.decode(ids[:2]) == "<|im_start|>user"


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_base_llm_without_template_gets_a_plain_one(adds_bos):
    tokenizer = tiny_tokenizer(chat_template=None, bos_token="<|endoftext|>", pad_token="<|endoftext|>")
    if adds_bos:
        begin_with_bos(tokenizer)
    processor = VoraProcessor.from_llm(tokenizer, **EYES)
    messages = [user(coloured("red"), "what?"), assistant("red"), user("yes?"), assistant("no")]
    sample = processor.training_sample(messages)
    assert spoken(processor, sample) == [" red<|im_end|>", " no<|im_end|>"]
    assert (sample["input_ids"] == 0).sum() == adds_bos and (sample["input_ids"][0] == 0) == adds_bos
    for turn in (1, 3):
        inputs = encode(processor, messages[:turn])["input_ids"][0].tolist()
        assert sample["input_ids"][: len(inputs)].tolist() == inputs


@pytest.mark.parametrize("sentencepiece", [True, False])
def test_training_tokens_are_those_of_the_whole_text(sentencepiece):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}user {{ m['content'] }} assistant{% else %}"
    template += " {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template, sentencepiece=sentencepiece)
    processor = VoraProcessor.from_llm(tokenizer, **EYES)
    messages = [user("what?", coloured("red")), assistant("red"), user("yes"), assistant("no")]
    sample = processor.training_sample(messages)
    image = processor.image_token * 9
    whole = f"user what?{image} assistant red<|im_end|>user yes assistant no<|im_end|>"
    assert sample["input_ids"].tolist() == tokenizer(whole)["input_ids"]
    assert [text.strip() for text in spoken(processor, sample)] == ["red<|im_end|>", "no<|im_end|>"]


def test_conversations_that_cannot_be_learned_from_are_refused(processor, llm_folder):
    with pytest.raises(ValueError, match="no assistant turn"):
        processor.training_sample([user("what?")])
    with pytest.raises(ValueError, match=r"2 places for images .* but 1 images"):
        processor.training_sample([user(coloured("red"), f"a {processor.image_token}"), assistant("red")])
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = VoraProcessor.from_llm(llm_folder, chat_template=rewriting, **EYES)
    with pytest.raises(ValueError, match="only appends"):
        other.training_sample([user("what?"), assistant("red")])


# Saved and loaded


def test_the_processor_saves_and_loads(tmp_path):
    tokenizer = tiny_tokenizer(padding_side="right")  # as many an LLM's
    processor = VoraProcessor.from_llm(tokenizer, image_mean=(0.1, 0.2, 0.3), min_image_tokens=2, **EYES)
    processor.save_pretrained(tmp_path)
    messages = [user(coloured("red", (40, 20)), "what?")]
    expected = encode(processor, messages)
    for loaded in (VoraProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is VoraProcessor
        assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
        found = encode(loaded, messages)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert loaded.tokenizer.pad_token == processor.tokenizer.pad_token
        padded = encode(loaded, [messages, [user("what colour is the shape? blue, red, or green, yes?")]])
        assert padded["attention_mask"][:, -1].all() and not padded["attention_mask"].all()
        sample = loaded.training_sample([*messages, assistant("red")])
        assert spoken(loaded, sample) == ["red<|im_end|>"]
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is VoraImageProcessor


ELSEWHERE = """
import sys
import numpy, torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
)
folder = sys.argv[1]
try:
    import vora
    sys.exit("vora is importable here")
except ImportError:
    pass
loaded = {auto: auto.from_pretrained(folder, trust_remote_code=True) for auto in
          (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor)}
model, processor = loaded[AutoModelForImageTextToText], loaded[AutoProcessor]
film = {"type": "video", "video": [Image.new("RGB", (12, 12), colour) for colour in ("red", "blue")]}
content = [{"type": "image", "image": Image.new("RGB", (12, 12), "red")}, film, {"type": "text", "text": "what?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                       return_tensors="pt", add_generation_prompt=True)
with torch.no_grad():
    numpy.save(folder + "/logits.npy", model(**inputs).logits.numpy())
    states = loaded[AutoModel](**inputs).last_hidden_state
    assert torch.equal(model.logits(states), model(**inputs).logits)
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
"""


def test_a_saved_folder_loads_where_this_package_is_not_installed(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_mm_prefix_lm"] is True
    # isolated (-I), in another folder and with the name blocked, nothing can bring the package back
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    surroundings["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    # one thread here as there: rounding depends on how a sum is shared out
    blocked = "import sys, torch; sys.modules['vora'] = None; torch.set_num_threads(1)\n" + ELSEWHERE
    command = [sys.executable, "-I", "-c", blocked, str(tmp_path)]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        asked = user(coloured("red"), "what?")
        asked["content"].insert(1, {"type": "video", "video": [coloured("red"), coloured("blue")]})
        expected = model(**encode(processor, [asked])).logits
    assert np.abs(np.load(tmp_path / "logits.npy") - expected.numpy()).max() == 0.0
    # what was saved there is as complete as what was saved here
    files = {file.name for file in tmp_path.iterdir() if file.suffix in (".py", ".json", ".jinja")}
    assert {"modeling_vora.py", "fetch_image.py", "to_rgb.py", "processing_vora.py"} <= files
    assert files == {file.name for file in (tmp_path / "again").iterdir() if file.suffix != ".safetensors"}


# Sizes


sides = st.integers(1, 5000)


@given(sides, sides, st.integers(1, 32), st.integers(1, 64), st.integers(2, 20))
@settings(deadline=None, max_examples=300)
def test_grids_keep_to_the_budget(height, width, patch_size, min_tokens, factor):
    rows, columns = fit_grid(height, width, patch_size, min_tokens, min_tokens * factor)
    assert rows >= 1 and columns >= 1
    assert min_tokens <= rows * columns <= min_tokens * factor


@given(sides, sides, st.integers(1, 32))
@settings(deadline=None, max_examples=200)
def test_grids_within_the_budget_are_the_nearest_whole_patches(height, width, patch_size):
    rows, columns = fit_grid(height, width, patch_size, 1, 10**9)
    assert abs(rows - height / patch_size) <= 0.5 or (rows == 1 and height < patch_size)
    assert abs(columns - width / patch_size) <= 0.5 or (columns == 1 and width < patch_size)


@given(st.integers(200, 3000), st.floats(0.25, 4))
@settings(deadline=None, max_examples=200)
def test_shrinking_keeps_the_aspect_ratio(height, ratio):
    width = round(height * ratio)
    rows, columns = fit_grid(height, width, 4, 4, 256)
    assert rows * columns >= 256 / 2
    assert math.isclose(columns / rows, width / height, rel_tol=0.3)


@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([(4, 16), (4, 64), (16, 16), (64, 256), (9, 9)]))
@settings(deadline=None, max_examples=200)
def test_no_grid_of_as_many_tokens_is_clearly_nearer_in_aspect_ratio(height, width, budget):
    rows, columns = fit_grid(height, width, 14, *budget)
    own = max(1, round(height / 14)) * max(1, round(width / 14))
    assert rows * columns <= budget[1]
    if budget[0] <= own <= budget[1]:
        return
    error = abs(math.log(rows / columns * width / height))
    for r in range(1, budget[1] + 1):
        for c in range(-(-budget[0] // r), budget[1] // r + 1):
            as_many = r * c >= rows * columns if own > budget[1] else r * c <= max(rows * columns, budget[0])
            if as_many:
                assert abs(math.log(r / c * width / height)) > error - 0.25, (r, c)


@pytest.mark.parametrize(
    "size, grid",
    [
        ((1, 1), (2, 2)),
        ((1, 4000), (1, 256)),
        ((4000, 1), (256, 1)),
        ((224, 224), (16, 16)),
        ((225, 223), (16, 16)),
        ((448, 448), (16, 16)),
        ((28, 28), (2, 2)),
        ((14, 14), (2, 2)),
        ((140, 70), (10, 5)),
    ],
)
def test_grids_of_some_sizes(size, grid):
    assert fit_grid(*size, 14, 4, 256) == grid
    image_processor = VoraImageProcessor(patch_size=14, max_image_tokens=256)
    inputs = image_processor(coloured("red", size[::-1]), return_tensors="np")
    assert inputs["image_grid_thw"].tolist() == [[1, *grid]]
    assert inputs["pixel_values"].shape == (math.prod(grid), 3 * 14**2)
    assert image_processor.get_number_of_image_patches(*size) == math.prod(grid)


def test_patches_are_in_raster_order_channel_first():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    image_processor = VoraImageProcessor(patch_size=4, image_mean=mean, image_std=std)
    patches = image_processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    for row in range(2):
        for column in range(3):
            patch = pixels[row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].transpose(2, 0, 1) / 255
            expected = (patch - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
            np.testing.assert_allclose(patches[row * 3 + column], expected.reshape(-1), rtol=1e-4, atol=1e-5)


def test_an_impossible_budget_is_refused():
    with pytest.raises(ValueError, match="min_image_tokens 9"):
        VoraImageProcessor(min_image_tokens=9, max_image_tokens=4)


# Images as people have them


def saved(image, kind, **kwargs):
    stream = io.BytesIO()
    image.save(stream, kind, **kwargs)
    return stream.getvalue()


def noise(size=(64, 48)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


BAD = {
    "missing.png": (None, "no such file"),
    "empty.png": (b"", "empty"),
    "truncated.jpg": (saved(noise(), "JPEG")[:900], "truncated"),
    "truncated.png": (saved(noise(), "PNG")[:900], ""),
    "header_only.gif": (b"GIF89a", ""),
    "text.png": (b"hello, this is no image", "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_cause_and_cure(processor, tmp_path, name):
    content, cause = BAD[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    for use in (fetch_image, processor.image_processor, lambda path: processor.training_sample(learnable(path))):
        with pytest.raises(ValueError) as caught:
            use(str(path))
        message = str(caught.value)
        assert name in message and cause in message and "Give a readable image" in message
        assert "\n" not in message


def learnable(path):
    return [{"role": "user", "content": [{"type": "image", "path": path}]}, assistant("red")]


def test_a_folder_and_a_bad_open_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        fetch_image(tmp_path)
    with pytest.raises(ValueError, match="truncated"):  # PIL notices when the pixels are wanted
        fetch_image(Image.open(io.BytesIO(saved(noise(), "JPEG")[:900])))


def read_back(image, kind, tmp_path, **kwargs):
    path = tmp_path / f"image.{kind.lower()}"
    image.save(path, kind, **kwargs)
    found = fetch_image(path)
    assert found.mode == "RGB"
    return found


def test_cmyk(tmp_path):
    found = read_back(coloured((0, 255, 255, 0), (16, 16), "CMYK"), "JPEG", tmp_path).getpixel((8, 8))
    assert found[0] > 200 and found[1] < 60 and found[2] < 60


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    for values in ([0, 256, 32768, 65535], [0, 100, 200, 255]):  # the second image is dark, not of 8 bits
        grey = np.array([values] * 4, dtype=np.uint16)
        found = np.asarray(read_back(Image.fromarray(grey), "PNG", tmp_path))
        assert np.abs(found[0, :, 0] - np.array(values) / 257).max() <= 0.5


@pytest.mark.parametrize("kind", ["TIFF"])
def test_32_bit_and_float_grey(tmp_path, kind):
    for dtype, values in ((np.int32, [0, 128, 255]), (np.float32, [0, 0.5, 1]), (np.float32, [0, 128, 255])):
        grey = np.array([values] * 3, dtype=dtype)
        found = np.asarray(read_back(Image.fromarray(grey), kind, tmp_path))
        assert found[0, :, 1].tolist() == [0, 128, 255]


def test_palette_with_transparency_lies_on_white(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 1), 1)
    found = read_back(image, "PNG", tmp_path, transparency=0)
    assert found.getpixel((0, 0)) == (255, 255, 255) and found.getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("L", 7, (7, 7, 7)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_transparency_lies_on_white(tmp_path, mode, colour, expected):
    assert read_back(coloured(colour, (4, 4), mode), "PNG", tmp_path).getpixel((2, 2)) == expected


def test_exif_rotation_is_applied(tmp_path):
    image = noise((6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by 90 degrees clockwise
    found = read_back(image, "PNG", tmp_path, exif=exif)
    assert np.array_equal(np.asarray(found), np.rot90(np.asarray(image), -1))


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [coloured(colour, (8, 8)) for colour in ("red", "blue", "lime")]
    found = read_back(frames[0], "GIF", tmp_path, save_all=True, append_images=frames[1:])
    assert found.getpixel((3, 3)) == (255, 0, 0)


def test_arrays_bytes_and_base64():
    pixels = np.asarray(noise((20, 10)))
    for array in (pixels, pixels.transpose(2, 0, 1), torch.from_numpy(pixels.copy()), pixels / 255):
        assert np.array_equal(np.asarray(fetch_image(array)), pixels)
    assert fetch_image(pixels[..., 0]).size == fetch_image(pixels[..., :1]).size == (20, 10)
    assert fetch_image(pixels[:, :1, 0]).size == (1, 10)
    encoded = base64.b64encode(saved(noise((20, 10)), "PNG")).decode()
    for source in (encoded, f"data:image/png;base64,{encoded}"):
        assert np.array_equal(np.asarray(fetch_image(source)), pixels)
    with pytest.raises(ValueError, match="Cannot read image http"):
        fetch_image("http://127.0.0.1:9/nothing.png")


TRANSPARENT = saved(coloured((0, 0, 0, 0), (8, 8), "RGBA"), "PNG")
DARK = saved(Image.fromarray(np.full((40, 40), 32768, dtype=np.uint16)), "PNG")


class Images(BaseHTTPRequestHandler):
    """Two images, an address that has moved, and nothing else."""

    def do_GET(self):
        content = {"/transparent.png": TRANSPARENT, "/dark.png": DARK}.get(self.path)
        self.send_response(200 if content else 302 if self.path == "/moved.png" else 404)
        self.send_header("Location", "/dark.png")
        self.end_headers()
        self.wfile.write(content or b"<html>not here</html>")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def address():
    server = HTTPServer(("127.0.0.1", 0), Images)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_images_at_urls_are_what_they_are_in_files(address):
    for name, content in {"transparent": TRANSPARENT, "dark": DARK, "moved": DARK}.items():
        assert fetch_image(f"{address}/{name}.png").tobytes() == fetch_image(content).tobytes()
    with pytest.raises(ValueError, match=r"none.png: the server answers 404 Not Found\. Give a readable"):
        fetch_image(f"{address}/none.png")


def test_images_in_base64_are_what_they_are_in_files():
    assert fetch_image(TRANSPARENT).getpixel((4, 4)) == (255, 255, 255)
    assert fetch_image(DARK).getpixel((4, 4)) == (128, 128, 128)
    for content in (TRANSPARENT, DARK):
        encoded = base64.b64encode(content).decode()
        for source in (encoded, f"data:image/png;base64,{encoded}"):
            assert fetch_image(source).tobytes() == fetch_image(content).tobytes()


def test_short_base64_is_a_image_unless_it_is_a_file(tmp_path, monkeypatch):
    encoded = base64.b64encode(saved(coloured("red", (4, 4)), "BMP")).decode()
    assert len(encoded) < 200
    assert fetch_image(encoded).getpixel((0, 0)) == (255, 0, 0)
    monkeypatch.chdir(tmp_path)
    coloured("blue").save(encoded[:20], "PNG")
    assert fetch_image(encoded[:20]).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match="abcd: there is no such file"):
        fetch_image("abcd")
