"""From messages and images, good and bad, to model inputs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from messages import SIZES, assistant, coloured, encode, spoken, user
from tiny import CHATML, tiny_tokenizer
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from vora import VoraForConditionalGeneration, VoraProcessor
from vora.data.packing import tokenize_sample
from vora.data.schema import Sample
from vora.train.from_recipe import check_chat_template


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


def test_markers_go_around_each_image_as_tokens_by_themselves(llm_folder, tmp_path):
    plain = VoraProcessor.from_llm(llm_folder, **SIZES)
    VoraProcessor.from_llm(llm_folder, image_markers=("<|image>", "<image|>"), **SIZES).save_pretrained(tmp_path)
    marked = VoraProcessor.from_pretrained(tmp_path)
    messages = [user("<", coloured("red"), ">|", coloured("blue"), "what?")]
    begin, end = (plain.tokenizer(text, add_special_tokens=False)["input_ids"] for text in marked.image_markers)
    ids = encode(plain, messages)["input_ids"][0].tolist()
    places = [place for place, id in enumerate(ids) if id == plain.image_token_id]
    expected = []
    for place, id in enumerate(ids):
        expected += begin if id == plain.image_token_id and place - 1 not in places else []
        expected += [id]
        expected += end if id == plain.image_token_id and place + 1 not in places else []
    assert encode(marked, messages)["input_ids"][0].tolist() == expected
    sample = marked.training_sample([*messages, {"role": "assistant", "content": "teal"}])
    assert sample["input_ids"][: len(expected)].tolist() == expected
    assert marked.text_tokenizer().chat_template == plain.text_tokenizer().chat_template


def test_batches_mix_images_videos_and_text_and_pad_left(processor):
    rows = [
        [user(coloured("red"), "what colour is the shape?")],
        [user([coloured("red"), coloured("teal")], "what?")],
        [{"role": "user", "content": "Is there a teal shape in the image?"}],
        [user("first", coloured("blue", (8, 8)), "second", coloured("green", (8, 8)))],
    ]
    batch = encode(processor, rows)
    mask = batch["attention_mask"]
    assert mask[:, -1].all() and (mask.diff(dim=1) >= 0).all() and not mask.all()
    alone = [encode(processor, row) for row in rows]
    for one, ids, seen in zip(alone, batch["input_ids"], mask.bool()):
        assert torch.equal(ids[seen], one["input_ids"][0])
    for name in ("pixel_values", "image_grid_thw"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in alone if name in one]))


def test_text_alone_has_no_pixels_and_is_what_the_llm_gets(processor, model):
    messages = [{"role": "user", "content": "what colour?"}]
    inputs = encode(processor, messages)
    assert set(inputs) == {"input_ids", "attention_mask"}
    own = tiny_tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert inputs["input_ids"][0].tolist() == own
    assert processor.image_token == "<reponame>" and processor.image_token_id == model.config.image_token_id
    assert processor.tokenizer.pad_token is not None


def test_an_llm_without_a_spare_token_grows_by_one(llm_folder, tmp_path):
    vocabulary = tiny_tokenizer().backend_tokenizer.to_str().replace("<reponame>", "<repository>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(vocabulary), eos_token="<|im_end|>")
    base = AutoModelForCausalLM.from_pretrained(llm_folder)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    grown = VoraForConditionalGeneration.from_llm(tmp_path, **SIZES)
    processor = VoraProcessor.from_llm(tmp_path, **SIZES)
    size = base.config.vocab_size
    assert processor.image_token == "<image>" and processor.image_token_id == size == grown.config.image_token_id
    assert grown.config.text_config.vocab_size == grown.lm_head.weight.shape[0] == size + 1
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(grown(ids).logits[..., :size], base(ids).logits)
        grown(**encode(processor, [user(coloured("red"), "what?")]))
    grown.save_pretrained(tmp_path / "grown")
    assert VoraForConditionalGeneration.from_pretrained(tmp_path / "grown").config.image_token_id == size


@pytest.mark.parametrize(
    "places, counts, message",
    [
        ([1, 2], [2, 1], "Row 0: .* 1 places .* 2 images"),
        ([1, 0], [1, 1], "Row 1: .* 0 places .* 1 images"),
        ([2, 1], [3], "2 texts are given, but lists of images for 1"),
        ([1], 2, "1 places .* 2 images"),
    ],
)
def test_each_text_needs_its_own_images_in_one_list_or_several(processor, places, counts, message):
    red = coloured("red")
    images = [red] * counts if isinstance(counts, int) else [[red] * count for count in counts]
    as_tuples = tuple(map(tuple, images)) if isinstance(images[0], list) else tuple(images)
    for given in (images, as_tuples):
        with pytest.raises(ValueError, match=message):
            processor(text=[processor.image_token * count + "a" for count in places], images=given)
    texts = [processor.image_token + "a", processor.image_token * 2 + "b"]
    flat = processor(text=texts, images=[red, coloured("teal", (12, 4)), coloured("blue", (8, 8))])
    nested = processor(text=texts, images=[[red], [coloured("teal", (12, 4)), coloured("blue", (8, 8))]])
    assert all(np.array_equal(flat[name], nested[name]) for name in nested)


def test_no_part_of_a_message_vanishes(processor, tmp_path):
    coloured("red").save(tmp_path / "red.png")
    plain = encode(processor, [user(str(tmp_path / "red.png"), "what?")])
    for kind in ("input_text", "output_text"):
        image = {"type": "image_url", "image_url": {"url": str(tmp_path / "red.png")}}
        found = encode(processor, [{"role": "user", "content": [image, {"type": kind, "text": "what?"}]}])
        assert all(torch.equal(found[name], plain[name]) for name in plain)
    unknown = [
        {"type": "audio", "audio": "a.wav"}, {"type": "tool_use", "input": {}}, {"type": "video"}, {"text": "what?"},
        {"type": "text"}, {"type": "text", "text": None}, {"type": "image_url"}, "what?", None,
    ]  # fmt: skip
    for part in unknown:
        messages = [user("yes?"), {"role": "user", "content": [{"type": "text", "text": "what?"}, part]}]
        for use in (processor.apply_chat_template, lambda one: processor.training_sample([*one, assistant("red")])):
            with pytest.raises(ValueError, match="Message 1 holds a part of type .* would be left out"):
                use(messages)


THINKS = (  # as Qwen3's, which leaves out what was thought before the newest question
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n"
    "{{ m['content'].split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m['content'] }}\n</think>\n\n"
    "{% endif %}{{ m['content'].split('</think>')[-1].strip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOSES = CHATML.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")  # as Phi-3's


@pytest.mark.parametrize("template, num_samples", [(CHATML, 1), (CLOSES, 1), (THINKS, 2)])
@pytest.mark.parametrize("first", ["red", "<think>\nhm\n</think>\n\nred"])
def test_each_answer_is_learned_after_its_own_prompt(template, num_samples, first):
    processor = VoraProcessor.from_llm(tiny_tokenizer(template, eos_token="<|endoftext|>"), **SIZES)
    messages = [user(coloured("red"), "what?"), assistant(first), user(coloured("blue"), "sure?"), assistant("yes")]
    samples = processor.training_samples(messages)
    assert len(samples) == num_samples
    empty = "<think>\n\n</think>\n\n" if template == THINKS else ""
    wanted = [f"{first if '<think>' in first else empty + first}<|im_end|>", f"{empty}yes<|im_end|>"]
    assert [text for sample in samples for text in spoken(processor, sample)] == wanted
    for turn, sample in zip((1, 3), samples if num_samples == 2 else samples * 2):
        prompt = encode(processor, messages[:turn], return_tensors="np")
        length = prompt["input_ids"].shape[1]
        assert (
            np.array_equal(sample["input_ids"][:length], prompt["input_ids"][0]) and sample["labels"][length] != -100
        )
        if num_samples == 2:
            assert all(np.array_equal(sample[name], prompt[name]) for name in ("pixel_values", "image_grid_thw"))
    messages[1]["learn"] = False
    assert [text for one in processor.training_samples(messages) for text in spoken(processor, one)] == wanted[1:]


def test_answers_apart_share_what_comes_before_them():
    """Image and text of the first question stand once; several images where their turns are apart."""
    processor = VoraProcessor.from_llm(tiny_tokenizer(THINKS), **SIZES)
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}, assistant("red")]
    asked = [turn for text in ("sure?", "really?") for turn in (user(text), assistant("yes"))]
    for num_images, num_grids in (1, 1), (2, 7):
        sample = Sample("", [coloured("red")] * num_images, [[*seen * num_images, *asked]])
        found = tokenize_sample(sample, processor, sample.conversations)
        assert found["num_samples"] == num_images + 2 and len(found["image_grid_thw"]) == num_grids
        assert (found["input_ids"] == processor.image_token_id).sum() == found["image_grid_thw"].prod(-1).sum()
        said = processor.tokenizer.decode(found["targets"][found["targets"] != -100])
        assert said.count("yes<|im_end|>") == 2 and said.count("</think>") == num_images + 2


@pytest.mark.parametrize(
    "template, cause",
    [
        # as DeepSeek-R1's: thinking begins in the prompt, and an answer is written without
        (CHATML.replace("assistant\n{%", "assistant\n<think>{%"), "only appends"),
        ("{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if p['type'] == 'text' %}"
         "{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}", "leaves out what the user says"),
    ],
)  # fmt: skip
def test_templates_of_which_nothing_can_be_learned_are_refused_before_training(template, cause):
    processor = VoraProcessor.from_llm(tiny_tokenizer(template), **SIZES)
    with pytest.raises(ValueError, match=f"set model.chat_template.*{cause}"):
        check_chat_template(processor)


CONVERSATION = [
    {"role": "system", "content": "system"},
    user(coloured("red"), "what colour is the shape?"),
    assistant("red"),
    user("Is there a circle?", [coloured("blue", (8, 8)), coloured("teal", (8, 8))]),  # a video
    assistant("no, none"),
]


@pytest.mark.parametrize("turn", [2, 4])
def test_labels_are_the_answers_and_follow_the_very_tokens_of_generation(processor, turn):
    sample = processor.training_sample(CONVERSATION[: turn + 1])
    assert spoken(processor, sample) == ["red<|im_end|>", "no, none<|im_end|>"][: turn // 2]
    learned = sample["labels"] != -100
    assert np.array_equal(sample["labels"][learned], sample["input_ids"][learned])
    inputs = encode(processor, CONVERSATION[:turn], return_tensors="np")
    length = inputs["input_ids"].shape[1]
    assert np.array_equal(sample["input_ids"][:length], inputs["input_ids"][0]) and learned[length]
    assert all(np.array_equal(sample[name], inputs[name]) for name in ("pixel_values", "image_grid_thw"))
    unlearned = [{**message, "learn": False} for message in CONVERSATION[: turn + 1]]
    assert spoken(processor, processor.training_sample(unlearned)) == []


def test_a_turn_ends_where_the_template_ends_it():
    """Qwen2.5's base models end texts with <|endoftext|>, and turns with <|im_end|>."""
    processor = VoraProcessor.from_llm(tiny_tokenizer(eos_token="<|endoftext|>"), **SIZES)
    tokenizer = processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(processor.end_ids) == ["<|endoftext|>", "<|im_end|>"]
    assert spoken(processor, processor.training_sample(CONVERSATION)) == ["red<|im_end|>", "no, none<|im_end|>"]
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=[5, 0]))
    processor.end_turns_of(model)
    assert model.generation_config.eos_token_id == sorted({5, *processor.end_ids})


@pytest.mark.parametrize("sentencepiece", [True, False])
@pytest.mark.parametrize(
    "turn",
    [
        "{{ m['role'] + ': ' + m['content'] + '\n' }}",  # no special token ends a turn
        "{{ ' ' + m['content'] + ' ' + eos_token }}",  # a space is no end, though decoders leave it out
        "{{ ' ' + m['content'] + '\n' + eos_token }}",
        "{{ ' ' + m['content'] + ' ' }}",
        "{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}",  # drops them
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_whose_turns_the_tokenizers_own_token_ends(turn, sentencepiece):
    template = "{{ '<|endoftext|>' }}{% for m in messages %}" + turn + "{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template, sentencepiece=sentencepiece)
    processor = VoraProcessor.from_llm(tokenizer, **SIZES)
    assert processor.end_ids == [tokenizer.eos_token_id]
    model = SimpleNamespace(generation_config=GenerationConfig(eos_token_id=None))
    processor.end_turns_of(model)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_base_llm_without_template_gets_a_plain_one(adds_bos):
    tokenizer = tiny_tokenizer(chat_template=None, bos_token="<|endoftext|>", pad_token="<|endoftext|>")
    if adds_bos:  # before every text, as many tokenizers do
        before = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = before
    processor = VoraProcessor.from_llm(tokenizer, **SIZES)
    messages = [user(coloured("red"), "what?"), assistant("red"), user("yes?"), assistant("no")]
    sample = processor.training_sample(messages)
    assert spoken(processor, sample) == [" red<|im_end|>", " no<|im_end|>"]
    assert (sample["input_ids"] == 0).sum() == adds_bos and (sample["input_ids"][0] == 0) == adds_bos
    inputs = encode(processor, messages[:3])["input_ids"][0].tolist()
    assert sample["input_ids"][: len(inputs)].tolist() == inputs
    processor.set_template(CHATML)  # where there is one, it alone writes special tokens
    for ids in (encode(processor, messages[:1])["input_ids"][0], processor.training_sample(messages)["input_ids"]):
        assert processor.tokenizer.decode(ids[:2]) == "<|im_start|>user"


@pytest.mark.parametrize("sentencepiece", [True, False])
def test_training_tokens_are_those_of_the_whole_text(sentencepiece):
    template = "{% for m in messages %}{% if m['role'] == 'user' %}user {{ m['content'] }} assistant{% else %}"
    template += " {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    tokenizer = tiny_tokenizer(chat_template=template, sentencepiece=sentencepiece)
    processor = VoraProcessor.from_llm(tokenizer, **SIZES)
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
        asked = user(coloured("red"), "what?")
        processor.training_sample([{**asked, "content": [*asked["content"], {"type": "image"}]}, assistant("red")])
    rewriting = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    other = VoraProcessor.from_llm(llm_folder, chat_template=rewriting, **SIZES)
    with pytest.raises(ValueError, match="only appends"):
        other.training_sample([user("what?"), assistant("red")])


def test_half_a_surrogate_pair_is_no_text(processor):
    with pytest.raises(ValueError, match=r"message of 'user' holds '\\ud83d', half of a surrogate pair"):
        encode(processor, [user("what \ud83d?")])


@pytest.mark.parametrize("said", [None, {}, [], ["hi"], [{"content": "hi"}], [{"role": "user", "content": 3}], "hi"])
def test_what_is_no_conversation_is_refused(processor, said):
    for use in (processor.apply_chat_template, processor.training_samples):
        with pytest.raises(ValueError, match="A conversation is a list of messages|Message 0 is no dict"):
            use(said)
