"""A processor and a model saved and loaded, also where this package is not installed."""

import json

import numpy as np
import torch
from messages import SIZES, assistant, coloured, encode, spoken, user
from tiny import command_line, tiny_tokenizer
from transformers import AutoProcessor

from vora import VoraImageProcessor, VoraProcessor


def test_the_processor_saves_and_loads(tmp_path):
    tokenizer = tiny_tokenizer(padding_side="right")  # as many an LLM's
    processor = VoraProcessor.from_llm(tokenizer, image_mean=(0.1, 0.2, 0.3), min_image_tokens=2, **SIZES)
    messages = [user(coloured("red", (40, 20)), "what?")]
    batch = [messages, [user("what colour is the shape? blue, red, or green, yes?")]]
    processor(text="what?", padding="max_length", max_length=60, truncation=True)  # is asked of this call alone
    processor.save_pretrained(tmp_path)
    expected = encode(processor, batch)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["padding"] is None and saved["truncation"] is None
    assert expected["attention_mask"][:, -1].all() and not expected["attention_mask"].all()
    for loaded in (VoraProcessor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is VoraProcessor and type(loaded.image_processor) is VoraImageProcessor
        assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
        found = encode(loaded, batch)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert spoken(loaded, loaded.training_sample([*messages, assistant("red")])) == ["red<|im_end|>"]


ELSEWHERE = """
import sys
import numpy, torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
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
    # with the name blocked nothing can bring the package back; one thread, for rounding depends on their number
    blocked = "import os, sys; os.environ['HF_MODULES_CACHE'] = sys.argv[1] + '/modules'; sys.modules['vora'] = None\n"
    done = command_line(tmp_path, code=blocked + ELSEWHERE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)  # another test may have changed it
    with torch.no_grad():
        asked = [user(coloured("red"), [coloured("red"), coloured("blue")], "what?")]
        expected = model(**encode(processor, asked)).logits
    assert np.abs(np.load(tmp_path / "logits.npy") - expected.numpy()).max() == 0.0
    # what was saved there is as complete as what was saved here
    files = {file.name for file in tmp_path.iterdir() if file.suffix in (".py", ".json", ".jinja")}
    assert {"modeling_vora.py", "fetch_image.py", "to_rgb.py", "processing_vora.py"} <= files
    assert files == {file.name for file in (tmp_path / "again").iterdir() if file.suffix != ".safetensors"}
