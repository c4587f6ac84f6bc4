"""What `vora inspect` shows: attention as each family computes it, likeness that is not flattered, words, a page."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import tiny
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tiny import FAMILIES, IMAGE, PATCH, logits_of, prompt, save_tiny_vit, text, tiny_llm, tiny_vora

import vora
from vora.checkpoint.card import CardFacts, write_card
from vora.checkpoint.layout import HEADS_FILE, read_info, write_info
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.eval.inspect.attention_weights import attention_at, words_of_tokens
from vora.eval.inspect.colours import aligned, colours, principal_components
from vora.eval.inspect.inspection import inspect_image
from vora.eval.inspect.page import finding, write_inspection
from vora.eval.inspect.teacher import take_teacher
from vora.eval.metrics.cka import linear_cka, of_one_length

NOISE, PAIRS = Image.effect_noise((40, 24), 90).convert("RGB"), [(0, 0), (1, 1)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_at(places, model, **inputs):
    with torch.no_grad(), attention_at(model, places) as weights:
        model.model(**inputs, use_cache=False)
    return weights


@pytest.mark.parametrize(
    ("family", "with_lora"), [*((family, False) for family in FAMILIES), ("llama", True), ("gpt2", True)]
)
def test_attention_is_what_the_family_reports_and_images_see_themselves_whole(family, with_lora):
    words, model, llm = prompt(text(11)), tiny_vora(family), tiny_llm(family)
    llm.set_attn_implementation("eager")
    with torch.no_grad():
        expected = llm(**words, output_attentions=True).attentions
    weights = weights_at([2, -1], model, **words)
    assert list(weights) == [0, 1, 2]
    for block, own in enumerate(expected):
        torch.testing.assert_close(weights[block], own[0, :, [2, 10]].mean(0), atol=1e-5, rtol=0)

    inputs = prompt([*text(2), (2, 3, 0), *text(4, 1), (1, 2, 1), *text(2, 2)])
    length = inputs["input_ids"].shape[1]
    if with_lora:
        model = vora.attach_vision_lora(model, rank=2).get_base_model()
    before, attends = logits_of(model, **inputs), model.model.language_model.config._attn_implementation
    weights = weights_at(range(length), model, **inputs)
    assert torch.equal(logits_of(model, **inputs), before)  # all is put back
    assert not any(module._forward_hooks for module in model.modules())
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[2:8, 2:8] = sees[12:14, 12:14] = True
    has_window = getattr(model.config.get_text_config(), "sliding_window", None)
    for found in weights.values():
        torch.testing.assert_close(found.sum(-1), torch.ones(length), atol=1e-5, rtol=0)
        assert (found[~sees] == 0).all() and (has_window or (found[sees] > 0).all())
    with pytest.raises(ValueError, match="image tokens"):
        weights_at([0], model, input_ids=torch.tensor([[IMAGE]]))
    assert model.model.language_model.config._attn_implementation == attends  # also after an error


@pytest.mark.parametrize("sentencepiece", [False, True])
def test_words_are_put_together_from_all_their_tokens(sentencepiece):
    tokenizer = tiny.tiny_tokenizer(sentencepiece=sentencepiece)
    said = "Is the teal shape black-and-white , or isn't it ? blue !"
    if not sentencepiece:
        said += " é 🙂 青 い"  # characters of several tokens
    joined = re.sub(" ([,?!🙂い])", r"\1", said)
    ids = [*tokenizer(joined)["input_ids"], tokenizer.eos_token_id]
    words = words_of_tokens(ids, tokenizer)
    assert [word for word, _ in words] == said.split()
    used = [token for _, tokens in words for token in tokens]
    assert sorted(set(used)) == used and len(used) > len(words)  # in order, none twice
    assert all(word in tokenizer.decode([ids[token] for token in tokens]) for word, tokens in words)
    assert words_of_tokens([], tokenizer) == []


def test_cka_is_the_unbiased_estimate_and_knows_no_rotation_or_scale():
    one, other = noise(12, 5), noise(12, 7, seed=1)
    turned = one @ torch.linalg.qr(noise(5, 5, seed=2))[0] * 3
    values = linear_cka([one, other], [one, turned, other])
    torch.testing.assert_close(values[0, :2], torch.ones(2))

    def hsic(*sides):  # equation 5 of Song et al. 2012
        centred = [of_one_length(states) - of_one_length(states).mean(0) for states in sides]
        k, m = ((states @ states.T).fill_diagonal_(0) for states in centred)
        n = len(k)
        total = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m).sum()
        return total / (n * (n - 3))

    expected = hsic(one, other) / (hsic(one, one) * hsic(other, other)).sqrt()
    torch.testing.assert_close(values[0, 2], expected.float())
    # more channels than tokens: the biased estimate gives more than 0.9
    values = [float(linear_cka([noise(16, 500, seed=2 * i)], [noise(16, 300, seed=2 * i + 1)])) for i in range(20)]
    assert abs(sum(values)) / 20 < 0.05
    for few, many in ((noise(3, 8), noise(3, 8)), (torch.ones(9, 8), noise(9, 8)), (torch.zeros(9, 8), noise(9, 8))):
        assert linear_cka([few], [many]).isnan().all()  # too few tokens, or nothing that differs
    long = noise(3000, 4)
    torch.testing.assert_close(linear_cka([long], [2 * long]), torch.ones(1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (2, 40), (1, 8)])
def test_components_are_those_of_a_singular_value_decomposition(shape):
    states = noise(*shape)
    scores, shares = principal_components(5 * states)  # of one length, so that factors play no part
    centred = of_one_length(states) - of_one_length(states).mean(0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    wanted = torch.zeros(len(states), 3)
    wanted[:, : len(values[:3])] = left[:, :3] * values[:3]
    torch.testing.assert_close(scores.abs(), wanted.abs(), atol=1e-4, rtol=0)
    explained = (values**2 / (values**2).sum().clamp(min=1e-9))[:3]
    assert shares == pytest.approx([*explained.tolist(), 0, 0][:3], abs=1e-5)


def test_colours_do_not_flip_and_use_the_whole_range_whatever_a_few_tokens_do():
    scores = principal_components(noise(50, 8))[0]
    flipped = scores[:, [2, 0, 1]] * torch.tensor([-1.0, 1.0, -1.0])
    torch.testing.assert_close(aligned(flipped, scores), scores)
    torch.testing.assert_close(aligned(flipped + 0.1 * noise(50, 3), 7 * scores), scores, atol=0.5, rtol=0)
    scores = noise(200, 3)
    scores[0], scores[:, 2] = 1e6, 0
    found = colours(scores)
    assert found.min() == 0 and found.max() == 1 and (found[:, 2] == 0.5).all()  # one that says nothing
    assert 0.2 < found[1:, :2].std() < 0.4  # 1e6 would have pressed all others together
    assert (colours(torch.zeros(5, 3)) == 0.5).all()


@pytest.fixture(scope="module")
def seeing(llm_folder, teacher_folder):
    """A learner with a teacher and heads, and a processor; every image token is 2 x 2 patches."""
    sides = {"patch_size": PATCH, "image_size": 4 * PATCH}
    torch.manual_seed(0)
    student = vora.VoraForConditionalGeneration.from_llm(llm_folder, patch_merge=2, **sides)
    processor = vora.VoraProcessor.from_llm(llm_folder, patch_merge=2, max_image_tokens=24, **sides)
    heads = BlockwiseDistillation([*block_pairs(3, 2), (1, SUMMARY)], 32, 24, standardize=True)
    for moment in (heads.mean_0, heads.mean_1):
        moment += noise(24)
    teacher = vora.Teacher.from_pretrained(teacher_folder)
    teacher.name = "a teacher"
    return Objective(student, processor.image_processor, teacher, heads).eval(), processor


@pytest.fixture(scope="module")
def found(seeing):
    return inspect_image(*seeing, NOISE, "what?", "teal shape", PAIRS)


@pytest.fixture
def inputs(seeing):
    """A question about the image, as the model takes it."""
    content = [{"type": "image", "image": NOISE}, {"type": "text", "text": "what?"}]
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = seeing[1].apply_chat_template([{"role": "user", "content": content}], **kwargs)
    del inputs["attention_mask"]
    return inputs


def test_likeness_is_what_training_maximises_and_the_mirror_is_the_control(seeing, inputs, found):
    learner, processor = seeing
    assert found.grid == (3, 5) and found.image.size == (40, 24)  # of 8 pixels a token, as it came
    is_image = inputs["input_ids"][0] == processor.image_token_id
    mirrored = learner.teach(**processor.image_processor(ImageOps.mirror(NOISE), return_tensors="pt"))
    with torch.no_grad():
        losses = learner(torch.full_like(inputs["input_ids"], -100), **inputs)
        said = learner.distillation.heads["1"](tiny.states_of_blocks(learner.vora, **inputs)[1][0, is_image])
    cosines = [likeness["cosine"] for likeness in found.pair_likeness]
    assert cosines == pytest.approx((1 - losses["pair_losses"][:2]).tolist(), abs=1e-5)
    expected = torch.cosine_similarity(said, learner.distillation.target((1, 1), mirrored[1]), dim=-1).mean()
    assert found.pair_likeness[1]["cosine_mirrored"] == pytest.approx(float(expected), abs=1e-5)
    assert abs(found.pair_likeness[1]["cosine_mirrored"] - cosines[1]) > 1e-3
    symmetric = inspect_image(*seeing, Image.new("RGB", (40, 24), "red"), "what?", "blue", PAIRS)
    for likeness in symmetric.pair_likeness:
        for name in ("cka", "cosine", "centred_cosine"):
            assert float(likeness[name]) == pytest.approx(float(likeness[f"{name}_mirrored"]), abs=1e-4)
    with torch.no_grad():  # a head that says the same of all patches earns a cosine, and nothing once that is off
        silent = copy.deepcopy(learner)
        silent.distillation.standardize = False
        silent.distillation.mean_0.fill_(-50)
        silent.distillation.heads["0"][1].weight.zero_()
        silent.distillation.heads["0"][1].bias.fill_(1.0)
    flattered = inspect_image(silent, processor, NOISE, "what?", "blue", PAIRS).pair_likeness[0]
    assert flattered["cosine"] > 0.95 and abs(flattered["centred_cosine"]) < 1e-4


def test_blocks_are_compared_token_by_token_with_the_merged_patches(seeing, inputs, found):
    assert found.cka["blocks"] == [-1, 0, 1, 2] and found.cka["teacher_blocks"] == [0, 1]
    images = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        tokens, taught = seeing[0].vora.model.patch_embedding(*images), seeing[0].teach(*images, blocks=[0, 1])
    torch.testing.assert_close(found.cka["cka"][:1], linear_cka([tokens], [taught[0], taught[1]]), atol=1e-4, rtol=0)
    assert found.pair_likeness[1]["cka"] == found.cka["cka"][2, 1]
    assert set(found.colours) == {-1, 0, 1, 2} and set(found.teacher_colours) == {0, 1}
    for student, teacher in PAIRS:  # the teacher's components are given the signs that agree
        sides = torch.cat([found.colours[student], found.teacher_colours[teacher]], 1).T.corrcoef()
        assert (sides[:3, 3:].diag() > -0.05).all()


def test_a_word_looked_from_the_place_where_it_was_chosen(seeing, inputs, found):
    learner, processor = seeing
    assert found.answer == "teal shape" and [word.text for word in found.words] == ["teal", "shape"]
    prompt, model = inputs["input_ids"], copy.deepcopy(learner.vora)
    spoken = processor.tokenizer("teal shape", add_special_tokens=False, return_tensors="pt")["input_ids"]
    model.set_attn_implementation("eager")
    inputs["input_ids"] = torch.cat([prompt, spoken], 1)
    with torch.no_grad():
        blocks = model.model(**inputs, output_attentions=True, use_cache=False).attentions
    tokens = dict(words_of_tokens(spoken[0].tolist(), processor.tokenizer))["teal"]
    places = [prompt.shape[1] - 1 + token for token in tokens]
    image_places = (prompt[0] == processor.image_token_id).nonzero()[:, 0]
    expected = [weights[0].mean(0)[places][:, image_places].mean(0) for weights in blocks]
    torch.testing.assert_close(torch.stack(list(found.words[0].attention.values())), torch.stack(expected))
    assert found.words[0].even_share == pytest.approx(sum(15 / (place + 1) for place in places) / len(places))


def test_the_models_own_answer_is_greedy_may_be_nothing_and_needs_room(seeing, inputs, monkeypatch):
    learner, processor = seeing
    own = inspect_image(learner, processor, NOISE, "what?", pairs=PAIRS, max_new_tokens=4)
    said = learner.vora.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert own.answer == processor.tokenizer.decode(said, skip_special_tokens=True).strip()
    end = torch.tensor([[processor.tokenizer.eos_token_id]])
    monkeypatch.setattr(type(learner.vora), "generate", lambda self, input_ids, **_: torch.cat([input_ids, end], 1))
    silent = inspect_image(learner, processor, NOISE, "what?", pairs=PAIRS)
    assert silent.answer == "" and silent.words == [] and silent.as_json()["attention"]["words"] == []
    with pytest.raises(ValueError, match="context holds 256"):
        inspect_image(*seeing, NOISE, "what? " * 300)


@pytest.mark.parametrize("size", [(40, 24), (8, 200), (300, 9), (8, 8)])
def test_the_page_needs_nothing_beside_it(seeing, tmp_path, size):
    found = inspect_image(*seeing, Image.effect_noise(size, 90).convert("RGB"), "<what>?", "blue, teal & red", PAIRS)
    path = tmp_path / "new" / "page.html"
    write_inspection(path, found, seeing[1].image_processor, "a.png", "model", ["mind <this>"])
    page = path.read_text()
    assert "&lt;what&gt;?" in page and "mind &lt;this&gt;" in page and "blue, teal &amp; red" in page
    sources = re.findall(r'src="([^"]{21})', page)
    assert len(sources) > 10 and set(sources) == {"data:image/png;base64"}
    assert not re.search(r"https?://|<script|<link", page)
    figures = json.loads(path.with_suffix(".json").read_text())
    sentence = f'<p class="finding">{figures["finding"]}</p>'.replace("'", "&#x27;")
    assert page.index("<h1>") < page.index(sentence) < page.index("<details")  # before all that is folded
    assert page.count("<details open>") == 2 and page.count("<details>") == 3 + 4 and page.count("<h2>") == 5
    rows, columns = figures["grid"]
    assert (rows * columns < 4) == (figures["similarity"]["cka"][0][0] is None)
    for word in figures["attention"]["words"]:
        assert len(word["map"]) == rows and len(word["map"][0]) == columns
        assert sum(map(sum, word["map"])) == pytest.approx(word["share"], abs=1e-4) and word["share"] < 1
        assert len(word["share_by_block"]) == len(figures["attention"]["blocks"]) == 3
    assert [pair["student"] for pair in figures["similarity"]["pairs"]] == [0, 1]


def test_the_finding_is_of_the_attention_and_of_the_mirror(found):
    said = finding(found)
    by_block = torch.tensor([[*word.share_by_block().values()] for word in found.words]).mean(0)
    block, share = int(by_block.argmax()) + 1, f"{100 * float(by_block.mean()):.0f} % of its attention"
    assert share in said and f"most in block {block}, with {100 * float(by_block.max()):.0f} %" in said
    cka, mirrored = (sum(float(one[name]) for one in found.pair_likeness) / 2 for name in ("cka", "cka_mirrored"))
    assert f"a CKA of {cka:.2f}" in said and f"of {mirrored:.2f} where the teacher sees the mirrored image" in said
    assert said.count(".\n") == 0 and said.endswith("image.")
    few = replace(found, pair_likeness=[{**one, "cka": math.nan} for one in found.pair_likeness])
    alone = finding(replace(found, teacher=None))
    assert finding(few) == alone and "CKA" not in alone and alone.endswith("%.")
    assert "nowhere" in finding(replace(found, words=[], answer=""))


def fresh(seeing):
    return Objective(seeing[0].vora, seeing[1].image_processor)


@pytest.fixture
def model(tmp_path):
    """A model's folder with a card that names a teacher, which lies beside it."""
    folder, teacher = tmp_path / "model", str(tmp_path / "vit")
    save_tiny_vit(teacher)
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "vora"}')
    recipe = {"teacher": {"name": teacher}, "model": {"llm": "x"}, "lora": {"num_blocks": 3}}
    write_card(folder, CardFacts(made="merged", stage="pretrain", base_llm="x", teacher=teacher, recipe=recipe))
    return str(folder)


def test_the_teacher_is_the_one_asked_for_or_the_cards(seeing, tmp_path, model):
    learner, teacher = fresh(seeing), str(tmp_path / "vit")
    pairs, remark = take_teacher(learner, model)
    assert pairs == [] and learner.teacher is None and "--teacher" in remark and "calls it vit" in remark
    assert take_teacher(learner, model, teacher) == (block_pairs(3, 2), None) and learner.teacher.name == teacher
    write_info(replace(read_info(model), block_pairs=((2, 0), (2, SUMMARY))), tmp_path / "model")
    assert take_teacher(fresh(seeing), model, teacher) == ([(2, 0)], None)  # as it was trained, though without heads
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nope", "teacher nope: there is no"),
        (str(tmp_path / "empty"), "holds no configuration of a model"),
    ):
        with pytest.raises(ValueError, match=message):
            take_teacher(fresh(seeing), model, name)


@pytest.mark.parametrize("pairing", ["outputs", "hidden_states"])
def test_heads_beside_a_model_are_used_with_their_teacher_alone(seeing, tmp_path, model, pairing):
    pairs, width = block_pairs(2, 2, pairing=pairing), seeing[0].config.text_config.hidden_size
    heads = BlockwiseDistillation(pairs, width, 24)
    save_file(heads.state_dict(), tmp_path / "model" / HEADS_FILE)
    learner = fresh(seeing)
    assert take_teacher(learner, model, str(tmp_path / "vit"))[0] == pairs
    for name, tensor in learner.distillation.state_dict().items():
        assert torch.equal(tensor, heads.state_dict()[name])
    found = inspect_image(learner, seeing[1], NOISE, "what?", "blue", pairs)
    assert [(one["student"], one["teacher"]) for one in found.pair_likeness] == pairs
    assert all("cosine" in one for one in found.pair_likeness)
    (tmp_path / "vit").rename(tmp_path / "other")  # another teacher, whom the heads were not trained for
    for learner in (learner, fresh(seeing)):
        _, remark = take_teacher(learner, model, str(tmp_path / "other"))
        assert learner.distillation is None and learner.teacher is not None and "left aside" in remark
