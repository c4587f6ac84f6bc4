"""Any decoder LLM of transformers reads images without per-family code, and keeps what it was."""

import copy
from functools import partial

import pytest
import tiny
import torch
from tiny import IMAGE, generate, logits_of, prompt, text, tiny_llm, tiny_vora
from transformers import AutoConfig, AutoModelForCausalLM

from vora import VoraForConditionalGeneration, attach_vision_lora, merge_vision_lora
from vora.model.modeling_vora import CACHE

# text, image A of 2 x 4, image B of 3 x 3 touching it, text
TWO_IMAGES = [*text(4), (2, 4, 0), (3, 3, 1), *text(5, 1)]
BEFORE, A, B, AFTER = slice(0, 4), slice(4, 12), slice(12, 21), slice(21, 26)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def vora(family):
    """Not to be changed by tests."""
    return tiny_vora(family)


close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


def test_text_logits_are_the_llms_own_to_the_last_bit(family, vora):
    llm = tiny_llm(family)
    inputs = prompt(text(9), text(12, 1))
    ids, positions = {"input_ids": inputs["input_ids"]}, (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    packed = torch.arange(12)[None] % 7
    for given in (ids, inputs, {**inputs, "position_ids": positions}, {**ids, "position_ids": packed}):
        assert torch.equal(logits_of(vora, **given), logits_of(llm, **given))


def changed_places(vora, inputs, patch):
    """bool[blocks, T]: where the blocks' outputs move when one patch does (one row)."""
    moved = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    moved["pixel_values"][patch] += 1
    pairs = zip(tiny.states_of_blocks(vora, **inputs), tiny.states_of_blocks(vora, **moved))
    return torch.stack([(before != after).any(-1)[0] for before, after in pairs])


def test_a_patch_moves_all_of_its_image_and_what_follows_but_nothing_before(vora):
    """Although the images touch."""
    for image, patches, before, after in ((A, (0, 3, 7), BEFORE, B), (B, (8, 12, 16), slice(0, 12), AFTER)):
        for patch in patches:
            changed = changed_places(vora, prompt(TWO_IMAGES), patch)
            assert changed[:, image].all() and not changed[:, before].any() and changed[-1, after].any()


def test_packed_documents_never_see_each_other(vora):
    first, second = [*text(3), (2, 4, 0)], [(3, 3, 1), *text(4, 1)]  # their images touch
    packed = prompt([*first, *second])
    packed["attention_mask"] = None
    packed["position_ids"] = torch.cat([torch.arange(11), torch.arange(13)])[None]
    states = tiny.states_of_blocks(vora, **packed)
    for document, places in ((first, slice(0, 11)), (second, slice(11, 24))):
        for found, expected in zip(states, tiny.states_of_blocks(vora, **prompt(document))):
            close(found[:, places], expected)
    moved = {**packed, "pixel_values": packed["pixel_values"] + torch.arange(17)[:, None].lt(8)}
    for before, after in zip(states, tiny.states_of_blocks(vora, **moved)):
        assert torch.equal(before[:, 11:], after[:, 11:])


def test_sdpa_equals_eager(vora):
    inputs = prompt(TWO_IMAGES, text(7))
    real = inputs["attention_mask"].bool()
    if getattr(vora.config.get_text_config(), "attn_logit_softcapping", None):
        pytest.skip("sdpa cannot cap scores: transformers has this family eagerly only, before 5.21 without the cap")
    assert vora.model.language_model.config._attn_implementation == "sdpa"
    eager = copy.deepcopy(vora)
    eager.set_attn_implementation("eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    close(logits_of(eager, **inputs)[real], logits_of(vora, **inputs)[real])


def test_cached_generation_equals_uncached(vora):
    inputs = prompt(TWO_IMAGES, [*text(3, 2), (3, 3, 3), *text(2, 3)], text(6, 4))
    expected = generate(vora, inputs, use_cache=False)
    assert torch.equal(generate(vora, inputs), expected)
    assert torch.equal(generate(vora, inputs, cache_implementation="static"), expected)
    ids = inputs["input_ids"]
    for token in expected[0]:  # and the loop of generate is no witness for itself
        mask = torch.ones_like(ids[:1])
        logits = logits_of(vora, **prompt(TWO_IMAGES) | {"input_ids": ids[:1], "attention_mask": mask})[0, -1]
        logits[[IMAGE, 2]] = -torch.inf
        assert logits.argmax() == token
        ids = torch.cat([ids, expected[:, ids.shape[1] - inputs["input_ids"].shape[1]][:, None]], 1)


def test_a_later_turn_may_bring_an_image_to_a_filled_cache(vora):
    whole = prompt(TWO_IMAGES)
    ids, patches, grids = (whole[name] for name in ("input_ids", "pixel_values", "image_grid_thw"))
    first = {"input_ids": ids[:, :12], "pixel_values": patches[:8], "image_grid_thw": grids[:1]}  # to image A's end
    later = {"input_ids": ids[:, 12:], "pixel_values": patches[8:], "image_grid_thw": grids[1:]}
    with torch.no_grad():
        cache = getattr(vora(**first, use_cache=True), CACHE)
        logits = vora(**later, attention_mask=whole["attention_mask"], past_key_values=cache).logits
    close(logits, logits_of(vora, **whole)[:, 12:])


def test_a_left_padded_batch_equals_its_rows_alone(vora):
    rows = [TWO_IMAGES, text(9, 5), [*text(3, 2), (3, 3, 3), *text(2, 3)]]
    batch = prompt(*rows)
    position_ids = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits, answers = logits_of(vora, **batch, position_ids=position_ids), generate(vora, batch)
    for number, row in enumerate(rows):
        alone = prompt(row)
        close(logits[number, -alone["input_ids"].shape[1] :], logits_of(vora, **alone)[0])
        assert torch.equal(answers[number], generate(vora, alone)[0])


def test_fresh_lora_is_the_identity_and_trains_exactly_itself_and_the_patch_embedding(family, vora):
    inputs = prompt(TWO_IMAGES)
    peft_model = attach_vision_lora(tiny_vora(family), rank=4, num_blocks=2)
    assert torch.equal(logits_of(peft_model, **inputs), logits_of(vora, **inputs))

    names = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    pairs = [name for name in names if "lora_" in name]
    num_embedding = sum(".patch_embedding." in name for name in names)
    assert num_embedding == len(names) - len(pairs) == len(list(vora.model.patch_embedding.parameters()))
    num_layers = sum(type(m).__name__ in ("Linear", "Conv1D") for m in vora.model.blocks[0].modules())
    assert len(pairs) == 2 * 2 * num_layers and all(".0." in name or ".1." in name for name in pairs)


def is_tied(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_merged_equals_unmerged_and_is_the_llm_again(family, tmp_path):
    base = tiny_llm(family)
    shapes = {name: tensor.shape for name, tensor in base.state_dict().items()}
    peft_model = attach_vision_lora(tiny_vora(copy.deepcopy(base)), rank=4)
    with pytest.raises(ValueError, match="merge_vision_lora"):
        peft_model.get_base_model().to_llm()
    tiny.train_a_little(peft_model)
    see, read = prompt(TWO_IMAGES), prompt(text(9))
    expected, read_expected = logits_of(peft_model, **see), logits_of(peft_model, **read)
    assert (read_expected - logits_of(base, **read)).abs().max() > 0.01

    merged = merge_vision_lora(peft_model)
    assert isinstance(merged, VoraForConditionalGeneration)
    assert all(p.requires_grad is False or "patch_embedding" in n for n, p in merged.named_parameters())
    close(logits_of(merged, **see), expected)
    close(logits_of(merged, **read), read_expected)

    llm = merged.to_llm()
    assert {name: tensor.shape for name, tensor in llm.state_dict().items()} == shapes
    assert type(llm) is type(base)
    for one in (merged, llm):
        assert is_tied(one) == base.config.tie_word_embeddings
    assert torch.equal(logits_of(llm, **read), logits_of(merged, **read))
    llm.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path), **read), logits_of(llm, **read))


def test_saves_and_loads_exactly(vora, tmp_path):
    vora.save_pretrained(tmp_path)
    loaded, report = VoraForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = vora.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    inputs = prompt(TWO_IMAGES)
    assert torch.equal(logits_of(loaded, **inputs), logits_of(vora, **inputs))
    assert is_tied(loaded) == is_tied(vora) == vora.config.text_config.tie_word_embeddings


OTHERS = {"bloom": {}, "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48}}
OTHERS |= {"gemma4_text": {"vocab_size_per_layer_input": 128}}


@pytest.mark.parametrize(("family", "extra"), OTHERS.items())
def test_families_that_cannot_see_are_refused(family, extra):
    config = AutoConfig.for_model(family, **{**tiny.SHAPE, **extra})
    with pytest.raises(ValueError, match=f"{family} .*not supported"):
        tiny_vora(AutoModelForCausalLM.from_config(config).eval())


def test_an_llm_that_ignores_masks_or_whose_logits_cannot_be_repeated_is_refused():
    llm = tiny_llm("llama")
    for layer in llm.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None}), with_kwargs=True
        )
    with pytest.raises(ValueError, match="ignores the attention mask"):
        tiny_vora(llm)
    llm = tiny_llm("llama")
    llm.register_forward_hook(lambda module, args, output: setattr(output, "logits", output.logits * 1.5))
    with pytest.raises(ValueError, match="cannot repeat .*not supported"):
        tiny_vora(llm)


def test_the_language_part_of_a_multimodal_model_is_an_llm_too():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**tiny.SHAPE, **tiny.FAMILIES["gemma3_text"]},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    llm = AutoModelForCausalLM.from_config(config).eval()
    vora = tiny_vora(llm)
    assert not any("vision_tower" in name for name, _ in vora.named_parameters())
    assert changed_places(vora, prompt(TWO_IMAGES), 12)[:, B].all()
    assert torch.equal(logits_of(vora.to_llm(), **prompt(text(5))), logits_of(llm, **prompt(text(5))))
