"""What a model says of an image: beams, embeddings, and inputs that do not fit together."""

import pytest
import torch
from tiny import IMAGE, generate, image, logits_of, prompt, text, tiny_vora

# text, image A of 2 x 4, image B of 3 x 3 touching it, text
TWO_IMAGES = [*text(4), (2, 4, 0), (3, 3, 1), *text(5, 1)]
ONE_IMAGE = [*text(3, 2), (3, 3, 3), *text(2, 3)]
ROWS = text(9, 5), TWO_IMAGES, ONE_IMAGE


@pytest.fixture(scope="module", params=[("llama", 1), ("mistral", 1), ("gemma2", 1), ("llama", 2), ("mistral", 2)])
def some(request):
    return tiny_vora(request.param[0], patch_merge=request.param[1])


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}]
)
def test_beams_of_rows_with_different_images_equal_the_rows_alone(some, how):
    merge = some.config.patch_merge
    together = generate(some, prompt(*ROWS, patch_merge=merge), **how)
    for row, answers in zip(ROWS, together.view(3, how.get("num_return_sequences", 1), -1)):
        assert torch.equal(answers, generate(some, prompt(row, patch_merge=merge), **how))


def test_embeddings_do_for_ids():
    vora, inputs = tiny_vora("llama"), prompt(TWO_IMAGES, ONE_IMAGE)
    expected = {beams: generate(vora, inputs, num_beams=beams) for beams in (1, 2)}
    inputs["inputs_embeds"] = vora.get_input_embeddings()(inputs.pop("input_ids"))
    for beams, answers in expected.items():
        how = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE, 2], "num_beams": beams}
        assert torch.equal(vora.generate(**inputs, **how), answers)


def test_logits_are_made_of_the_last_places_alone_and_those_are_contiguous():
    """Of a strided batch, torch's bf16 product on a processor copies the weights for each row."""
    vora, seen = tiny_vora("llama"), []
    vora.lm_head.register_forward_pre_hook(lambda _, args: seen.append((args[0].shape[1], args[0].is_contiguous())))
    generate(vora, prompt(*ROWS))
    assert seen == [(1, True)] * len(seen)


FITS = prompt(TWO_IMAGES)
ONE_GRID = {"pixel_values": image(1, 3), "image_grid_thw": torch.tensor([[1, 1, 3]])}


def test_inputs_that_do_not_fit_together_are_refused_with_both_counts():
    vora = tiny_vora("llama")
    for inputs, message in (
        (FITS | {"input_ids": FITS["input_ids"][:, 5:], "attention_mask": None}, "16 image tokens.* 17 patches"),
        (FITS | ONE_GRID, "17 image tokens.* 3 patches"),
        ({"input_ids": FITS["input_ids"]}, "17 image tokens.* 0 images"),
        (FITS | {"image_grid_thw": None}, "together"),
        (FITS | {"pixel_values": FITS["pixel_values"][1:]}, "16 patches but image_grid_thw describes 17"),
        (prompt(text(5)) | {"labels": torch.full((1, 5), -100)}, "All 5 labels are masked"),
    ):
        with pytest.raises(ValueError, match=message):
            vora(**inputs)
    with pytest.raises(ValueError, match=r"17 image tokens.* 3 patches"):
        generate(vora, FITS | ONE_GRID, num_beams=2)


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
    vora, inputs = tiny_vora("llama"), prompt(ONE_IMAGE)
    with torch.no_grad():
        states = vora.model(**inputs).last_hidden_state
        plain = vora(**inputs, return_dict=False), vora.model(**inputs, return_dict=False)
        vora.config.return_dict = False
        configured = vora(**inputs), vora.model(**inputs)
    vora.config.return_dict = True
    for whole, inner in (plain, configured):
        assert type(whole) is type(inner) is tuple
        assert torch.equal(whole[0], logits_of(vora, **inputs)) and torch.equal(inner[0], states)
