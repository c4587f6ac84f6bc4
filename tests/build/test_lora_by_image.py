"""Vision LoRA left unmerged: text is the LLM's own bit for bit, images are those of the merged model, in one batch."""

import copy

import pytest
import torch
from peft import PeftModel
from tiny import FAMILIES, IMAGE, generate, logits_of, prompt, text, tiny_llm, tiny_vora, train_a_little
from transformers import DynamicCache

from vora import attach_vision_lora, merge_vision_lora
from vora.build.lora_by_image import use_lora_by_image
from vora.model.modeling_vora import CACHE

SEEN = [*text(4), (4, 5, 0), *text(3, 1)]
WORDS = text(9, 2)


def trained(family, dtype=torch.float32, **options):
    peft_model = attach_vision_lora(tiny_vora(family).to(dtype), **{"rank": 4, "num_blocks": 2} | options)
    train_a_little(peft_model)
    return peft_model


def unmerged_and_merged(family, **options):
    peft_model = trained(family, **options)
    return use_lora_by_image(copy.deepcopy(peft_model)), merge_vision_lora(peft_model)


def as_text(inputs):
    """The same batch for an LLM that cannot see."""
    ids = inputs["input_ids"]
    return {"input_ids": ids.masked_fill(ids == IMAGE, 7), "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_is_the_llms_own_to_the_last_bit_also_beside_an_image(family, dtype):
    model, llm = use_lora_by_image(trained(family, dtype)), tiny_llm(family).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    alone = prompt(WORDS, text(5, 3))
    assert torch.equal(logits_of(model, **alone), logits_of(llm, **alone))
    for rows in ([SEEN, WORDS], [text(80, 4), SEEN]):
        mixed = prompt(*rows)
        number = next(number for number, row in enumerate(rows) if row is not SEEN)
        is_word = mixed["attention_mask"][number].bool()
        expected = logits_of(llm, **as_text(mixed))[number, is_word]
        assert torch.equal(logits_of(model, **mixed)[number, is_word], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_conversations_with_an_image_are_the_merged_models(family):
    model, merged = unmerged_and_merged(family, lora_alpha=8)
    for inputs in (prompt(SEEN), prompt(SEEN, WORDS, [(3, 3, 1), *text(30, 5), (2, 2, 2)])):
        is_seen = (inputs["input_ids"] == IMAGE).any(1)
        found, expected = (logits_of(one, **inputs)[is_seen] for one in (model, merged))
        kept = inputs["attention_mask"][is_seen].bool()
        torch.testing.assert_close(found[kept], expected[kept], atol=1e-3, rtol=0)
    inputs = prompt(SEEN)  # and the LoRA there is does something
    assert (logits_of(merged, **inputs) - logits_of(tiny_vora(family), **inputs)).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_each_of_a_batch_goes_on_as_it_began(family, options):
    """As on its own, with its own model; the padded LLM is held against itself."""
    model, merged = unmerged_and_merged(family)
    llm, mixed = tiny_llm(family), prompt(SEEN, WORDS)

    def said(one, inputs):
        torch.manual_seed(0)
        return generate(one, inputs, **options).unflatten(0, (len(inputs["input_ids"]), -1))

    found = said(model, mixed)
    assert torch.equal(found[0], said(merged, mixed)[0])
    assert torch.equal(found[1], said(llm, as_text(mixed))[1])
    assert not torch.equal(found[1], said(merged, mixed)[1]) or options, "LoRA changes these words"


def test_a_chat_gets_lora_with_its_first_image():
    """The second turn is read anew, so all of it is the merged model's."""
    model, merged = unmerged_and_merged("llama")
    first, second = prompt(WORDS), prompt([*WORDS, *SEEN])
    assert torch.equal(generate(model, first), generate(tiny_llm("llama"), first))
    assert torch.equal(generate(model, second), generate(merged, second))
    assert torch.equal(generate(model, first), generate(tiny_llm("llama"), first))  # and nothing of it is left


def read(model, *rows):
    with torch.no_grad():
        return getattr(model(**prompt(*rows), use_cache=True), CACHE)


def test_a_cache_goes_on_as_it_was_read():
    model, merged = unmerged_and_merged("llama")
    for other, row in ((merged, SEEN), (tiny_llm("llama"), WORDS)):
        given = {"input_ids": torch.tensor([text(5, 7)])}
        inputs = prompt(row) if other is merged else as_text(prompt(row))
        with torch.no_grad():
            expected = other(**given, **{CACHE: getattr(other(**inputs, use_cache=True), CACHE)}).logits
            found = model(**given, **{CACHE: copy.deepcopy(read(model, row))}).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_cache_that_was_computed_otherwise_is_refused():
    model, one = unmerged_and_merged("llama")[0], {"input_ids": torch.tensor([[7]])}
    more = prompt([(2, 2, 0), 9])
    more.pop("attention_mask")
    with pytest.raises(ValueError, match="1 of 1 conversations get their first image after text"):
        model(**more, **{CACHE: read(model, WORDS)})
    of_llm = DynamicCache()
    tiny_llm("llama")(**one, **{CACHE: of_llm})
    with pytest.raises(ValueError, match="cache is of 0 conversations .* and 1 are to go on"):
        model(**one, **{CACHE: of_llm})
    mixed = read(model, SEEN, WORDS)
    with pytest.raises(ValueError, match="cache is of 2 conversations"):
        model(**one, **{CACHE: mixed})
    assert torch.equal(logits_of(model, **prompt(WORDS)), logits_of(tiny_llm("llama"), **prompt(WORDS)))


def test_what_it_saves_is_peft_s_adapter(tmp_path):
    """Over a fresh model PEFT alone loads it, and it can be merged yet."""
    model, merged = unmerged_and_merged("llama")
    model.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.glob("*.safetensors")}
    assert names == {"adapter_model.safetensors"}
    again = PeftModel.from_pretrained(tiny_vora("llama"), tmp_path)
    torch.testing.assert_close(logits_of(again, **prompt(SEEN)), logits_of(merged, **prompt(SEEN)), atol=1e-4, rtol=0)
    late = merge_vision_lora(model)
    torch.testing.assert_close(logits_of(late, **prompt(WORDS)), logits_of(merged, **prompt(WORDS)))
    assert not late.model._forward_pre_hooks and not late.model._forward_hooks


@torch.no_grad()
def test_rows_of_a_cache_that_change_places_stay_what_they_are():
    model, mixed = use_lora_by_image(trained("llama")), prompt(SEEN, WORDS)
    after, mask = torch.tensor([[13], [14]]), torch.cat([mixed["attention_mask"], torch.ones(2, 1).long()], 1)

    def go_on(change, order):
        cache = model(**mixed, use_cache=True).past_key_values
        change(cache)
        return model(input_ids=after[order], attention_mask=mask[order], past_key_values=cache).logits

    wanted, turned = go_on(lambda cache: None, [0, 1]), torch.tensor([1, 0])
    torch.testing.assert_close(go_on(lambda cache: cache.reorder_cache(turned), [1, 0]), wanted[turned])
    torch.testing.assert_close(go_on(lambda cache: cache.batch_select_indices(turned), [1, 0]), wanted[turned])
    twice = go_on(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1])
    torch.testing.assert_close(twice, wanted.repeat_interleave(2, 0))


def test_gradients_with_checkpointing_are_those_without():
    """Blocks that are computed again after the pass is over know which rows have an image, also after another pass."""
    found, mixed = [], prompt(SEEN, WORDS)
    for checkpointing in (False, True):
        model = use_lora_by_image(trained("llama")).train().requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(**inputs, labels=inputs["input_ids"]).loss for inputs in (mixed, prompt(WORDS, WORDS), mixed)]
        sum(losses).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys() and any("lora_A" in name for name in found[0])
    assert all(torch.equal(found[1][name], found[0][name]) for name in found[0])
