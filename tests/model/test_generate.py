"""What a model says of an image: beams, samples, streams, and inputs that do not fit together."""

import pytest
import torch
from tiny import IMAGE, generate, image, logits_of, prompt, text, tiny_tokenizer, tiny_vora
from transformers import TextIteratorStreamer

# text, image A of 2 x 4, image B of 3 x 3 touching it, text
TWO_IMAGES = [*text(4), (2, 4, 0), (3, 3, 1), *text(5, 1)]


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def some(request):
    return tiny_vora(request.param)


@pytest.mark.parametrize("some", ["llama", "mistral", "gemma2"], indirect=True)
@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}]
)
def test_beams_of_rows_with_different_images_equal_the_rows_alone(some, how):
    rows = [text(9, 5), TWO_IMAGES, [*text(3, 2), (3, 3, 3), *text(2, 3)]]
    count = how.get("num_return_sequences", 1)
    together = generate(some, prompt(*rows), **how).view(3, count, -1)
    for row, answers in zip(rows, together):
        assert torch.equal(answers, generate(some, prompt(row), **how))


@pytest.mark.parametrize("some", ["llama", "mistral", "gemma2"], indirect=True)
def test_sampling_is_seeded_and_returns_several_sequences(some):
    inputs = prompt(TWO_IMAGES, [*text(3, 2), (3, 3, 3), *text(2, 3)])
    how = {"do_sample": True, "num_return_sequences": 3, "temperature": 5.0, "max_new_tokens": 4}
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(generate(some, inputs, **how))
    assert answers[0].shape == (6, 4)
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


def test_the_answer_depends_on_the_image_also_with_beams():
    vora = tiny_vora("llama")
    answers = [generate(vora, prompt([*text(3), (3, 3, seed), *text(2, 1)]), num_beams=2) for seed in range(6)]
    assert len({tuple(answer[0].tolist()) for answer in answers}) > 1


def test_streams_what_it_generates():
    tokenizer, vora, inputs = tiny_tokenizer(), tiny_vora("llama"), prompt(TWO_IMAGES)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    answer = generate(vora, inputs, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(answer[0])


def test_generates_from_embeddings():
    vora, inputs = tiny_vora("llama"), prompt(TWO_IMAGES, [*text(3, 2), (3, 3, 3), *text(2, 3)])
    expected = generate(vora, inputs)
    embedded = {**inputs, "inputs_embeds": vora.get_input_embeddings()(inputs["input_ids"])}
    embedded.pop("input_ids")
    for how in ({}, {"num_beams": 1, "num_return_sequences": 1}):
        found = vora.generate(**embedded, max_new_tokens=6, do_sample=False, suppress_tokens=[IMAGE, 2])
        assert torch.equal(found, expected)
    beams = vora.generate(**embedded, max_new_tokens=6, num_beams=2, suppress_tokens=[IMAGE, 2])
    assert torch.equal(beams, generate(vora, inputs, num_beams=2))


def test_losses_and_gradients_with_checkpointing_are_the_same():
    inputs = prompt(TWO_IMAGES)
    labels = inputs["input_ids"].clone()
    labels[:, :21] = -100
    gradients = []
    for checkpointing in (False, True):
        vora = tiny_vora("llama").train()
        if checkpointing:
            vora.gradient_checkpointing_enable()
        vora(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in vora.named_parameters()})
    assert gradients[0]["model.patch_embedding.patch.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6)


@pytest.mark.parametrize("rows, tokens, patches", [([[(2, 4, 0), 20]], 7, 8), ([[(2, 4, 0), 20]], 8, 16)])
def test_a_wrong_number_of_image_tokens_is_refused_with_both_counts(rows, tokens, patches):
    vora, inputs = tiny_vora("llama"), prompt(*rows)
    if tokens == 7:
        inputs["input_ids"] = inputs["input_ids"][:, 1:]
        inputs["attention_mask"] = None
    else:
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"], image(2, 4)])
        inputs["image_grid_thw"] = inputs["image_grid_thw"].repeat(2, 1)
    with pytest.raises(ValueError, match=rf"{tokens} image tokens.* {patches} patches"):
        logits_of(vora, **inputs)


def test_image_tokens_without_images_and_patches_without_grids_are_refused():
    vora, inputs = tiny_vora("llama"), prompt(TWO_IMAGES)
    with pytest.raises(ValueError, match="17 image tokens.* 0 images"):
        logits_of(vora, input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="together"):
        logits_of(vora, input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    inputs["pixel_values"] = inputs["pixel_values"][1:]
    with pytest.raises(ValueError, match="16 patches but image_grid_thw describes 17"):
        logits_of(vora, **inputs)


def test_all_labels_masked_is_refused():
    inputs = prompt(text(5))
    with pytest.raises(ValueError, match="All 5 labels are masked"):
        tiny_vora("llama")(**inputs, labels=torch.full((1, 5), -100))


def test_beams_refuse_a_wrong_number_of_image_tokens_with_both_counts():
    vora, inputs = tiny_vora("llama"), prompt([*text(3), (2, 3, 0), *text(2)])
    inputs |= {"pixel_values": inputs["pixel_values"][:3], "image_grid_thw": torch.tensor([[1, 1, 3]])}
    with pytest.raises(ValueError, match=r"6 image tokens.* 3 patches"):
        generate(vora, inputs, num_beams=2)


@pytest.mark.parametrize("suppressed", [None, [2]])
def test_the_image_token_is_never_generated_whatever_else_is_suppressed(suppressed):
    """Prompt lookup takes its candidates from the prompt, and image tokens are most of it."""
    vora, inputs = tiny_vora("llama"), prompt([20, (2, 3, 0), 21, 22, 20])
    greedy = generate(vora, inputs, suppress_tokens=suppressed)
    assert torch.equal(generate(vora, inputs, suppress_tokens=suppressed, prompt_lookup_num_tokens=4), greedy)
    with torch.no_grad():
        vora.lm_head.weight = torch.nn.Parameter(torch.zeros_like(vora.lm_head.weight))
        vora.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(IMAGE), 128).float())
    assert IMAGE not in generate(vora, inputs, suppress_tokens=suppressed)


def test_outputs_are_tuples_for_those_who_ask():
    vora, inputs = tiny_vora("llama"), prompt([*text(3), (2, 3, 0), *text(2)])
    with torch.no_grad():
        expected, states = vora(**inputs), vora.model(**inputs)
        asked = [vora(**inputs, return_dict=False), vora.model(**inputs, return_dict=False)]
        vora.config.return_dict = False
        configured = [vora(**inputs), vora.model(**inputs)]
    for whole, inner in (asked, configured):
        assert type(whole) is type(inner) is tuple
        assert torch.equal(whole[0], expected.logits) and torch.equal(inner[0], states.last_hidden_state)
