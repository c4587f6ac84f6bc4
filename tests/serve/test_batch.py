"""Answers made side by side are those made alone, whoever joins and leaves."""

import pytest
import torch
from tiny import FAMILIES, IMAGE, generate, prompt, tiny_vora, train_a_little

from vora import attach_vision_lora
from vora.build.lora_by_image import use_lora_by_image
from vora.checkpoint import load_model
from vora.serve import batch as batch_module
from vora.serve import engine as engine_module
from vora.serve.batch import Batch, can_batch, packed, read_together
from vora.serve.engine import ContextError, Engine
from vora.serve.sampling import Sampling, draw, nucleus
from vora.serve.text_stream import TextStream

ROWS = [[11, (2, 3, 0), 12, 13], [14, 15], [(3, 3, 1), 16, (1, 2, 2), 17, 18], [19, 20, 21, 22, 23, 24, 25, 26]]


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_join_and_leave_are_what_they_are_alone(family, monkeypatch):
    """Each row joins two steps after the one before, and leaves after 6 tokens; the first goes on past the spare
    columns of the cache."""
    monkeypatch.setattr(batch_module, "SPARE", 5)
    model = tiny_vora(family).eval()
    lengths = [14, 6, 6, 6]
    wanted = [generate(model, prompt(row), max_new_tokens=n)[0].tolist() for row, n in zip(ROWS, lengths)]
    batch, rows, said, step = Batch(model), [], [[] for _ in ROWS], 0
    suppressed = torch.tensor([IMAGE, 2])

    def take(row, logits):
        logits[suppressed] = -torch.inf
        said[row].append(int(logits.argmax()))

    while rows or step == 0:
        if step % 2 == 0 and step // 2 < len(ROWS):
            rows.append(step // 2)
            take(rows[-1], batch.join([prompt(ROWS[rows[-1]])])[0])
        for row, logits in zip(rows, batch.step([said[row][-1] for row in rows])):
            take(row, logits)
        for place in reversed(range(len(rows))):
            if len(said[rows[place]]) >= lengths[rows[place]]:
                batch.leave(place)
                last = rows.pop()
                if place < len(rows):
                    rows[place] = last
        step += 1
    assert [one[:n] for one, n in zip(said, lengths)] == wanted
    assert batch.lengths == [] and batch.mask.numel() == 0


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_read_in_one_pass_are_what_they_are_alone(family, monkeypatch):
    """Of different lengths, with one image and several, and of text alone."""
    model = tiny_vora(family).eval()
    if getattr(model.config.get_text_config(), "sliding_window", None):  # which holds them all, but not the answers
        for layer in (model.config.get_text_config(), *model.model.blocks):
            for module in (layer, getattr(layer, "self_attn", layer)):
                if getattr(module, "sliding_window", None):
                    module.sliding_window = 31
    prompts = [prompt(row) for row in ROWS]
    assert read_together(model, prompts) == [0, 2] and read_together(model, prompts[1:]) == [0, 2]
    wanted = [generate(model, inputs, max_new_tokens=6)[0].tolist() for inputs in prompts]
    batch, suppressed = Batch(model), torch.tensor([IMAGE, 2])
    said = []
    for joining in ([1, 3], [0, 2]):
        for logits in batch.join([prompts[number] for number in joining]):
            said.append([int(logits.index_fill(0, suppressed, -torch.inf).argmax())])
    for _ in range(5):
        for one, logits in zip(said, batch.step([one[-1] for one in said])):
            one.append(int(logits.index_fill(0, suppressed, -torch.inf).argmax()))
    assert said == [wanted[number] for number in (1, 3, 0, 2)]


def test_prompts_are_read_together_as_far_as_tokens_and_window_let_them(monkeypatch):
    model, window = tiny_vora("llama"), tiny_vora("mistral")
    texts = [prompt([11] * length) for length in (4, 7, 2, 3)]
    assert read_together(window, texts) == [0, 2] and read_together(window, texts[1:]) == [0]
    assert read_together(model, texts) == [0, 1, 2, 3] and read_together(model, []) == []
    monkeypatch.setattr(batch_module, "MOST_READ", 14)
    assert read_together(model, texts) == [0, 1, 2]
    assert packed(texts[:1]) is texts[0] and packed(texts[1:3])["position_ids"].tolist() == [[*range(7), 0, 1]]


@torch.inference_mode()
def test_rows_with_an_image_alone_have_unmerged_lora():
    """A row of text that takes the place of one with an image stays without LoRA, also beside others that have it."""
    peft_model = attach_vision_lora(tiny_vora("llama"), rank=4, num_blocks=2)
    train_a_little(peft_model)
    model = use_lora_by_image(peft_model)
    text, image = prompt(ROWS[3]), prompt(ROWS[0])
    alone = Batch(model)
    wanted = [alone.join([text])[0], alone.step([30])[0]]
    batch = Batch(model)
    batch.join([image, image])
    found = batch.join([text])[0]
    batch.leave(0)
    assert batch.with_image == [False, True] and torch.equal(found, wanted[0])
    steps = batch.step([30, 31])
    assert torch.allclose(steps[0], wanted[1], atol=1e-5)
    beside = Batch(model)
    beside.join([image])
    assert torch.allclose(steps[1], beside.step([31])[0], atol=1e-5)


@torch.inference_mode()
def test_numbers_that_are_none_stay_in_their_row():
    model = tiny_vora("llama").eval()
    alone, batch = Batch(model), Batch(model)
    wanted = [alone.join([prompt(ROWS[3])]), alone.step([30])[0]]
    batch.join([prompt(ROWS[0])])
    batch.join([prompt(ROWS[2])])
    for layer in batch.cache.layers:
        layer.keys[1], layer.values[1] = torch.nan, torch.nan
    batch.leave(1)
    assert torch.equal(batch.join([prompt(ROWS[3])]), wanted[0])
    assert torch.allclose(batch.step([31, 30])[1], wanted[1], atol=1e-5)


@torch.inference_mode()
def test_memory_that_runs_out_while_a_prompt_joins_changes_no_other_answer(monkeypatch):
    model, new_zeros, given = tiny_vora("llama").eval(), torch.Tensor.new_zeros, []
    wanted, batch = Batch(model), Batch(model)
    wanted.join([prompt([14, 15, 16])])
    batch.join([prompt([14, 15, 16])])

    def runs_out(tensor, *args, **kwargs):
        given.append(args)
        if len(given) == 3:  # of seven that more room takes
            raise torch.OutOfMemoryError("no memory")
        return new_zeros(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_zeros", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        batch.join([prompt(list(range(20, 60)))])
    assert torch.equal(batch.step([20]), wanted.step([20]))


def test_a_prompt_of_no_numbers_does_not_spoil_those_read_with_it(model_folder):
    model, processor = load_model(str(model_folder))
    engine, asked = Engine(model, processor), [{"role": "user", "content": "what?"}]
    wanted = "".join(engine.submit(asked, max_new_tokens=5))
    spoilt = processor.tokenizer("red", add_special_tokens=False)["input_ids"][0]
    assert spoilt not in processor.ids_of(processor.apply_chat_template(asked))
    engine.model.get_input_embeddings().weight.data[spoilt] = torch.nan
    answers = [engine.submit([{"role": "user", "content": text}], max_new_tokens=5) for text in ("x", "red", "what?")]
    assert "".join(answers[2]) == wanted
    with pytest.raises(ValueError, match="logits are no numbers"):
        list(answers[1])


def test_positions_that_change_with_the_longest_row_are_not_shared():
    model = tiny_vora("llama").eval()
    assert can_batch(model)
    model.config.get_text_config().rope_parameters["rope_type"] = "dynamic"
    assert not can_batch(model)


def test_an_error_in_a_prompt_or_a_draw_is_of_its_row_alone(model_folder, monkeypatch):
    engine = Engine(*load_model(str(model_folder)))
    wanted = "".join(engine.submit([{"role": "user", "content": "what?"}], max_new_tokens=20))
    join = Batch.join

    def broken(batch, prompts):
        if max(inputs["input_ids"].shape[1] for inputs in prompts) > 20:
            raise RuntimeError("no memory")
        return join(batch, prompts)

    monkeypatch.setattr(Batch, "join", broken)
    answers = [engine.submit([{"role": "user", "content": "what?" + " what?" * (n % 2 * 9)}], max_new_tokens=20)
               for n in range(4)]  # fmt: skip
    assert ["".join(answers[n]) for n in (0, 2)] == [wanted] * 2
    for n in (1, 3):
        with pytest.raises(RuntimeError, match="no memory"):
            next(answers[n])
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda *given: step(*given) * float("nan"))
    with pytest.raises(ValueError, match="logits are no numbers"):
        list(engine.submit([{"role": "user", "content": "what?"}], max_new_tokens=20))
    monkeypatch.undo()
    assert "".join(engine.submit([{"role": "user", "content": "what?"}], max_new_tokens=20)) == wanted


def test_who_waits_joins_while_others_are_answered(model_folder, monkeypatch):
    model, processor = load_model(str(model_folder))
    model.generation_config.eos_token_id, engine = None, Engine(model, processor, max_batch_size=2)
    engine._ends = lambda: set()
    rows = []

    class Watched(Batch):
        def step(self, tokens):
            rows.append(len(tokens))
            return super().step(tokens)

    monkeypatch.setattr(engine_module, "Batch", Watched)
    answers = [engine.submit([{"role": "user", "content": "what?"}], max_new_tokens=n) for n in (90, 5, 5, 5)]
    texts = ["".join(answer) for answer in answers]
    assert max(rows) == 2 and len(rows) < 100 and all(texts) and [one.num_tokens for one in answers] == [90, 5, 5, 5]


def test_a_conversation_that_is_too_long_is_refused_and_an_answer_without_number_fits(model_folder):
    engine = Engine(*load_model(str(model_folder)), max_prompt_tokens=100, max_new_tokens=7)
    engine._ends = lambda: set()
    for options in ({"max_new_tokens": 250}, {"max_new_tokens": None}):
        long = "what? " * (1 if options["max_new_tokens"] else 99)
        with pytest.raises(ContextError):
            engine.submit([{"role": "user", "content": long}], **options)
    answer = engine.submit([{"role": "user", "content": "what?"}], max_new_tokens=None)
    assert list(answer) and answer.num_tokens == 7 and answer.finish_reason == "length"


def test_draws_follow_their_own_seed_and_share():
    logits, probs = torch.tensor([0.0, 3.0, 2.0, -9.0]), torch.tensor([0.5, 0.1, 0.4])
    assert draw(logits, Sampling(), None) == 1
    sampling = Sampling(temperature=1.0, seed=3)
    one, other = sampling.generator(), sampling.generator()
    draws = [draw(logits, sampling, one) for _ in range(40)]
    assert [draw(logits, sampling, other) for _ in range(40)] == draws and len(set(draws)) > 1
    assert draw(logits, Sampling(temperature=1e-12, seed=0), one) == 1
    assert [nucleus(probs, share)[1].tolist() for share in (0.0, 0.4, 0.6, 0.95)] == [[0], [0], [0, 2], [0, 2, 1]]
    flat = torch.full((1000,), 1e-3)
    assert len(nucleus(flat, 0.5)[1]) in (500, 501)


def test_letters_and_stop_texts_come_whole(processor):
    tokenizer = processor.tokenizer
    for stop, wanted in ((), "two é €, one"), (["€, o"], "two é "), (["one!", "xx"], "two é €, one"):
        stream = TextStream(tokenizer, stop)
        pieces = [stream.push(id) for id in tokenizer("two é €, one")["input_ids"]] + [stream.flush()]
        assert "".join(pieces).strip() == wanted.strip() and not any("\ufffd" in piece for piece in pieces)
        assert stream.stopped == (wanted == "two é ")
