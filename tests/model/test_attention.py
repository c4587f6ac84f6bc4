"""Who sees whom, place by place, and attention by segment, which is attention under those masks."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from tiny import FAMILIES, SHAPE, generate, logits_of, prompt, text, tiny_llm, tiny_vora
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoConfig, masking_utils

from vora import VoraForConditionalGeneration
from vora.checkpoint import load_model
from vora.model import segmented_sdpa as segments
from vora.model.attention import attention_masks, longest_sequence, sliding_window
from vora.model.modeling_vora import CACHE
from vora.model.segmented_sdpa import SEGMENTED_SDPA, cut, segmented_sdpa, use_segmented_sdpa_on_cpu

LENGTH = 40
KINDS = {"full": "llama", "sliding": "mistral", "both": "gemma3_text"}  # of masks


def config_of(kind, attention="sdpa"):
    return tiny_llm(KINDS[kind], _attn_implementation=attention).config


def grow(draw, seen_until, blocks, start, end):
    """Fill places from start to end with random trees, depth first: some of a tree's own tokens, then its branches."""
    while start < end:
        last = start + int(torch.randint(1, end - start + 1, (), generator=draw))
        own = start + int(torch.randint(1, last - start + 1, (), generator=draw))
        seen_until[start:own] = last - 1
        first, after = torch.randint(start, own + 1, (2,), generator=draw).sort().values.tolist()
        blocks[first:after] = start
        grow(draw, seen_until, blocks, own, last)
        start = last


def forest(seed):
    """(int[2, T] seen_until, int[2, T] blocks) of random packed rows whose last places are padding."""
    draw = torch.Generator().manual_seed(seed)
    seen_until = torch.arange(LENGTH).repeat(2, 1)
    blocks = torch.full_like(seen_until, -1)
    for row in range(2):
        grow(draw, seen_until[row], blocks[row], 0, LENGTH - 4)
    return seen_until, blocks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_trees_see_what_is_above_them(kind, attention, seed):
    """The rule, spelt out: a token before, if of the same tree and branch, and all of the same image."""
    config, (seen_until, blocks) = config_of(kind, attention), forest(seed)
    embeds, padded = torch.zeros(2, LENGTH, 8), torch.ones(2, LENGTH, dtype=torch.bool)
    if getattr(config, "sliding_window", None):
        with pytest.raises(ValueError, match=f"40 tokens .* sliding window of {config.sliding_window} tokens"):
            attention_masks(config, embeds, None, None, None, blocks, seen_until)
        config.sliding_window = LENGTH
    padded[0, :5] = False
    restarting = torch.arange(LENGTH)[None] % 7  # of no account where the borders are given
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    above = (key <= query) & (query <= seen_until[:, None])
    same_image = (blocks[:, :, None] == blocks[:, None]) & (blocks[:, None] >= 0)
    for attention_mask, numbers in product((None, padded), (blocks, None)):
        sees = above if numbers is None else above | same_image
        sees = sees if attention_mask is None else sees & padded[:, None]
        masks = attention_masks(config, embeds, attention_mask, None, restarting, numbers, seen_until)
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            assert torch.equal(mask[:, 0] if attention == "sdpa" else mask[:, 0] == 0, sees)


@pytest.mark.parametrize("with_images", [True, False])
def test_flex_gets_the_same_rule_as_a_function(with_images, monkeypatch):
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda mask_mod, **kwargs: mask_mod)  # it would compile
    seen_until, blocks = forest(2)
    given = torch.zeros(2, LENGTH, 8), None, None, None, blocks if with_images else None, seen_until
    rule = attention_masks(config_of("full", "flex_attention"), *given)
    dense = create_mask(rule, 2, 1, LENGTH, LENGTH, device="cpu")
    assert torch.equal(dense, attention_masks(config_of("full"), *given))


SEEN = [name for name in FAMILIES if name != "gemma2"]  # which transformers computes eagerly only
TWO_IMAGES = [*text(4), (2, 4, 0), (3, 3, 1), *text(5, 1)]  # they touch
ROWS = TWO_IMAGES, text(9, 5), [(3, 3, 3), *text(12, 3), (4, 4, 2), *text(2)], [*text(2), (2, 2, 0), *text(4)]


@pytest.fixture
def cuts(monkeypatch):
    """The segments that are made, of few places, so that tiny sequences have several, also of padding alone."""
    for name, size in {"SHORT": 0, "WHOLE": 3, "LONGEST": 7, "LONGEST_IN_PRODUCTS": 6}.items():
        monkeypatch.setattr(segments, name, size)
    made, segment = [], segments._segment
    monkeypatch.setattr(segments, "_segment", lambda *given: made.append(segment(*given)) or made[-1])
    return made


def twins(family, dtype=torch.float32):
    """The same model by sdpa and by segment."""
    plain = tiny_vora(family).to(dtype)
    ours = copy.deepcopy(plain)
    use_segmented_sdpa_on_cpu(ours, torch.device("cpu"))
    assert ours.model.language_model.config._attn_implementation == SEGMENTED_SDPA
    return plain, ours


close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", SEEN)
def test_a_padded_batch_by_segment_is_that_by_sdpa(family, cuts):
    plain, ours = twins(family)
    batch = prompt(*ROWS)
    real = batch["attention_mask"].bool()
    found = logits_of(ours, **batch)
    assert len(cuts) > 9 and found.isfinite().all()
    close(found[real], logits_of(plain, **batch)[real])
    assert torch.equal(generate(ours, batch), generate(plain, batch))
    static = {"cache_implementation": "static"}
    assert torch.equal(generate(ours, batch, **static), generate(plain, batch, **static))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_a_second_turn_and_packed_rows_by_segment_are_those_by_sdpa(family, cuts):
    plain, ours = twins(family)
    whole = prompt(TWO_IMAGES)
    first = {"input_ids": whole["input_ids"][:, :12], "pixel_values": whole["pixel_values"][:8]}
    first["image_grid_thw"] = whole["image_grid_thw"][:1]
    later = {"input_ids": whole["input_ids"][:, 12:], "pixel_values": whole["pixel_values"][8:]}
    later |= {"image_grid_thw": whole["image_grid_thw"][1:], "attention_mask": whole["attention_mask"]}
    packed = whole | {"attention_mask": None, "position_ids": torch.arange(26)[None] % 12}
    answers = []
    for model in (plain, ours):
        with torch.no_grad():
            cache = getattr(model(**first, use_cache=True), CACHE)
            answers.append([model(**later, past_key_values=cache).logits, logits_of(model, **packed)])
        assert (len(cuts) > 0) == (model is ours)
        with pytest.raises(ValueError, match="With past_key_values give only the images that are not in them"):
            model(**later | {name: whole[name] for name in ("pixel_values", "image_grid_thw")}, past_key_values=cache)
    close(*answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SEEN)
def test_text_by_segment_is_the_bare_llms_to_the_last_bit(family, dtype, cuts):
    _, ours = twins(family, dtype)
    llm, inputs = tiny_llm(family).to(dtype), prompt(text(9), text(12, 1))
    for given in ({"input_ids": inputs["input_ids"]}, inputs):
        assert torch.equal(logits_of(ours, **given), logits_of(llm, **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_segments_of_a_sequence(dtype):
    """Their real sizes: short rows are left alone, images without a mask, long text in parts that see no further."""

    def cut(*lengths):  # text, image, text
        blocks = torch.cat([torch.full((length,), i % 2 - 1) for i, length in enumerate(lengths)])[None]
        embeds = torch.zeros(1, blocks.shape[1], 8, dtype=dtype)
        mask = attention_masks(config_of("full", SEGMENTED_SDPA), embeds, None, None, None, blocks)
        rows = getattr(mask, "segments", [[]])
        return [(s.queries.start, s.queries.stop, s.keys.stop, s.added is not None) for s in rows[0]]

    assert cut(2, 30, 32) == []
    assert cut(2, 60, 40) == [(0, 102, 102, True)]
    in_products = dtype == torch.bfloat16
    expected = [(0, 288, 288, True)] if in_products else [(0, 2, 2, True), (2, 258, 258, False), (258, 288, 288, True)]
    assert cut(2, 256, 30) == expected
    ends = [250, 500, 750] if in_products else [50, 250, 500, 750]
    assert [end for _, end, _, _ in cut(50, 0, 700)][-2:] == ends[-2:]
    assert all(keys == end for _, end, keys, _ in cut(50, 0, 700))


def test_who_is_switched_to_segments(model, processor, tmp_path):
    for device, attention in (("cpu", "eager"), ("cuda", "sdpa")):
        vora = tiny_vora("llama")
        vora.set_attn_implementation(attention)
        use_segmented_sdpa_on_cpu(vora, torch.device(device))
        assert vora.config._attn_implementation == attention
    vora.to_llm().set_attn_implementation("eager")  # which is the LLM's own affair
    assert vora.model.language_model.config._attn_implementation == "sdpa"

    use_segmented_sdpa_on_cpu(model, torch.device("cpu"))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert VoraForConditionalGeneration.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    if not torch.cuda.is_available():
        loaded, _ = load_model(str(tmp_path))
        assert loaded.model.language_model.config._attn_implementation == SEGMENTED_SDPA


def test_in_training_long_segments_keep_no_softmax(monkeypatch):
    torch.manual_seed(0)
    states = [torch.randn(1, heads, 200, 8).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    mask = torch.ones(1, 1, 200, 200, dtype=torch.bool).tril()
    cut(mask, None, None, states[0])

    def run():
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.numel()) or t, lambda t: t):
            out, _ = segmented_sdpa(torch.nn.Module(), *states, mask)
        return out, torch.autograd.grad(out.float().square().sum(), states), max(found)

    products, their_gradients, most = run()
    monkeypatch.setattr("vora.model.segmented_sdpa.MOST_KEPT", 100)
    sdpa, gradients, fewer = run()
    assert most == 4 * 200 * 200 and fewer < most / 3
    torch.testing.assert_close(sdpa, products, atol=0.03, rtol=0.03)
    torch.testing.assert_close(gradients, their_gradients, atol=0.1, rtol=0.1)
    with torch.no_grad():  # nothing is kept then
        assert torch.equal(segmented_sdpa(torch.nn.Module(), *states, mask)[0], products)


def test_the_longest_sequence_is_the_context_or_the_window_where_blocks_slide():
    config = AutoConfig.for_model("qwen2", **SHAPE, use_sliding_window=True, sliding_window=64, max_window_layers=3)
    assert sliding_window(config) is None and longest_sequence(config) == 256  # its window begins above the last block
    config = AutoConfig.for_model("gemma3_text", **SHAPE, sliding_window=64)
    assert sliding_window(config) == longest_sequence(config) == 64
    assert sliding_window(AutoConfig.for_model("mistral", **SHAPE, sliding_window=32)) == 32
    assert longest_sequence(AutoConfig.for_model("llama", **SHAPE)) == 256
