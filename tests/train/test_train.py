"""A run on tiny random models: it learns, resumes exactly, stops well, and leaves what it promises."""

import json
import os
import shutil
import signal

import pytest
import tiny
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback, ViTConfig, ViTModel

import vora
from vora import VoraProcessor
from vora.build.lora import DISTILLATION_FILE
from vora.checkpoint.card import read_card
from vora.checkpoint.run_directory import trained_folder
from vora.data.readers import load_source
from vora.data.stream import PackedSequences
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.serve.engine import load_model
from vora.train.plan.meta_model import meta_model
from vora.train.progress import read_log
from vora.train.recipe import load_recipe
from vora.train.run import train, training_arguments
from vora.train.stages import build_learner, check_trainable, trainable_counts
from vora.train.throughput import precision_overrides, steps_that_fit
from vora.train.trained import merge_run

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (0, 0, 0)}


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """A JSON Lines file of plain coloured images: the answer is only in the image."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(folder / f"{name}.png")
        lines.append({"image": f"{name}.png", "questions": ["what colour?", "which?"], "answers": [name, name]})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "train.jsonl")


@pytest.fixture
def recipe(llm_folder, data_file, teacher_folder):
    return lambda **training: load_recipe(
        {
            "model": {"llm": llm_folder},
            "teacher": {"name": teacher_folder, "distill_only_steps": 2},
            "lora": {"rank": 8},
            "data": {"sources": [{"path": data_file}], "sequence_length": 128},
            "training": {
                "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "logging_steps": 1,
                "use_cpu": True, "warmup_steps": 1, **training,
            },
        }
    )  # fmt: skip


def run(recipe, folder, **kwargs):
    return train(recipe, folder, console=Console(quiet=True), **kwargs)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line.get("lm_loss"), line.get("distill_loss")) for line in lines}


def test_it_learns_what_only_the_images_tell(recipe, tmp_path):
    learned = recipe(max_steps=150, learning_rate=1e-2, lr_scheduler_type="linear")
    learned.lora.num_blocks = 3
    run(learned, tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert seen[150][0] < 0.5 * seen[3][0] and seen[150][1] < 0.5 * seen[1][1]
    model, processor = merge_run(tmp_path / "run")
    for name, colour in COLOURS.items():
        content = [{"type": "image", "image": Image.new("RGB", (16, 16), colour)}, {"type": "text", "text": "which?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        answer = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer.strip() == name


def test_checkpointed_blocks_train_alike(recipe, tmp_path):
    run(recipe(), tmp_path / "kept")
    kept = losses(tmp_path / "kept")
    for num_blocks in (True, 2):
        trainer = run(recipe(gradient_checkpointing=num_blocks), tmp_path / f"recomputed-{num_blocks}")
        flags = [block.gradient_checkpointing for block in trainer.model.vora.model.blocks]
        assert flags == [True, True, num_blocks is True]
        recomputed = losses(tmp_path / f"recomputed-{num_blocks}")
        assert kept.keys() == recomputed.keys()
        for step, found in kept.items():
            assert recomputed[step] == pytest.approx(found, abs=1e-5)
    with pytest.raises(ValueError, match="9 blocks .* the LLM has 3"):
        run(recipe(gradient_checkpointing=9), tmp_path / "nowhere")


def test_a_run_leaves_what_it_promises(recipe, tmp_path):
    folder = tmp_path / "run"
    run(recipe(save_steps=3), folder)
    names = {path.name for path in folder.iterdir()}
    assert {"recipe.yaml", "versions.json", "log.jsonl", "loss.png", "report.md", "final", "checkpoint-3"} <= names
    assert not list(folder.rglob("bad_samples.jsonl"))
    cards = {
        path.name: read_card(path) for path in (folder / "checkpoint-3", folder / "checkpoint-6", folder / "final")
    }
    assert {name: found["stages"][0]["steps"] for name, found in cards.items()} == {
        "checkpoint-3": 3, "checkpoint-6": 6, "final": 6,
    }  # fmt: skip
    assert str(tmp_path) not in (folder / "checkpoint-3" / "README.md").read_text()
    tensors = [name for path in folder.rglob("adapter_model.safetensors") for name in _keys(path)]
    assert tensors and not [name for name in tensors if "vit" in name or "head" in name]


def _keys(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_losses_are_those_of_an_uninterrupted_run(recipe, tmp_path, accumulation):
    values = {"max_steps": 8, "save_steps": 4, "gradient_accumulation_steps": accumulation}
    run(recipe(**values), tmp_path / "whole")

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedError, match="--resume"):
        run(recipe(**values), tmp_path / "cut", callbacks=[StopAt()])
    assert (tmp_path / "cut" / "checkpoint-5").exists() or (tmp_path / "cut" / "checkpoint-6").exists()
    of_cut, of_whole = read_card(trained_folder(tmp_path / "cut")), read_card(tmp_path / "whole" / "final")
    assert of_cut["base_llm"] == of_whole["base_llm"] != "not stated" and of_cut["stages"][0]["steps"] in (5, 6)
    run(load_recipe(tmp_path / "cut" / "recipe.yaml"), tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_a_run_killed_after_its_last_step_only_ends(recipe, tmp_path):
    run(recipe(save_steps=3), tmp_path / "run")
    whole = losses(tmp_path / "run")
    expected = (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "final")
    run(load_recipe(tmp_path / "run" / "recipe.yaml"), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == whole and max(whole) == 6
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_gradient_accumulation_equals_one_large_batch(recipe, tmp_path, balance):
    def without_distilling(**training):
        changed = recipe(max_steps=4, **training)
        changed.teacher.weight, changed.teacher.distill_only_steps = 0.0, 0
        changed.data.answer_balance = balance
        return changed

    run(without_distilling(per_device_train_batch_size=2), tmp_path / "one")
    run(without_distilling(per_device_train_batch_size=1, gradient_accumulation_steps=2), tmp_path / "two")
    learned = "answer_loss" if balance else "lm_loss"
    first, second = ([line[learned] for line in read_log(tmp_path / n / "log.jsonl")] for n in ("one", "two"))
    assert len(first) == 4 and first == pytest.approx(second, rel=1e-4)
    every = read_log(tmp_path / "one" / "log.jsonl")[0]["lm_loss"]
    assert first[0] == pytest.approx(every, rel=0.3)  # divided by the weights: label tokens would make it far smaller


def test_a_longer_run_hides_its_first_end_and_keeps_the_planned_steps(recipe, tmp_path):
    run(recipe(max_steps=4, save_steps=2), tmp_path / "run")

    class StopAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedError):
        run(recipe(max_steps=9, save_steps=2), tmp_path / "run", resume=True, callbacks=[StopAt()])
    assert trained_folder(tmp_path / "run").name in ("checkpoint-6", "checkpoint-7")
    planned = recipe(save_steps=2)  # max_steps 6, which the checkpoint knows better
    planned.max_minutes = 10.0
    assert run(planned, tmp_path / "run", resume=True).state.global_step == 9


def test_micro_batches_of_text_alone_do_not_raise_the_loss(recipe, tmp_path, data_file):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": "blue red green " * 9}) + "\n" for _ in range(8)))

    def mixed(**training):
        values = recipe(max_steps=3, learning_rate=0.0, **training).model_dump()
        values["teacher"], values["lora"]["text_kl_weight"] = None, 1.0
        values["data"]["sources"] = [{"path": data_file, "weight": 1}, {"path": str(texts), "weight": 1}]
        return load_recipe(values)

    run(mixed(per_device_train_batch_size=8), tmp_path / "one")
    run(mixed(per_device_train_batch_size=1, gradient_accumulation_steps=8), tmp_path / "eight")
    first, second = ([line["lm_loss"] for line in read_log(tmp_path / n / "log.jsonl")] for n in ("one", "eight"))
    assert first == pytest.approx(second, rel=1e-4)


def test_stage_two_trains_everything_and_saves_a_model(recipe, llm_folder, tmp_path):
    run(recipe(), tmp_path / "one")
    model, processor = merge_run(tmp_path / "one")
    model.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    stage_two = recipe(max_steps=2, learning_rate=1e-3).model_copy(update={"stage": "finetune", "teacher": None})
    stage_two.model.llm, stage_two.model.vora = None, str(tmp_path / "merged")
    run(stage_two, tmp_path / "two")
    trained, _ = merge_run(tmp_path / "two")
    changed = [n for n, p in trained.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(changed) > 0.9 * len(list(trained.parameters()))


def test_merged_language_part_is_the_stock_llm(recipe, llm_folder, tmp_path):
    run(recipe(), tmp_path / "run")
    model, _ = merge_run(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(llm_folder)
    llm = model.to_llm()
    assert {n: p.shape for n, p in llm.state_dict().items()} == {n: p.shape for n, p in base.state_dict().items()}
    assert not torch.equal(llm.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)


def test_only_the_stage_s_parts_train(recipe):
    learner, _ = build_learner(recipe())
    counts = trainable_counts(learner)
    assert counts["LLM"][0] == 0
    assert all(
        trained == total for part, (trained, total) in counts.items() if part in ("vision LoRA", "distill heads")
    )
    assert "teacher" not in " ".join(name for name, _ in learner.named_parameters())
    learner.vora.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="should train none of the LLM"):
        check_trainable(learner, "pretrain")


def test_answers_end_with_the_turn_though_texts_of_the_llm_end_otherwise(recipe, llm_folder, tmp_path):
    """As of Qwen2.5's base models, whose eos_token is not what their chat template ends a turn with."""
    folder = shutil.copytree(llm_folder, tmp_path / "base")
    tokenizer = tiny.tiny_tokenizer(eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    wanted = recipe(max_steps=3)
    wanted.model.llm = str(folder)
    run(wanted, tmp_path / "run")
    model, processor = merge_run(tmp_path / "run")
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends == model.to_llm().generation_config.eos_token_id
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    assert load_model(str(tmp_path / "out"))[0].generation_config.eos_token_id == ends


def test_a_deeper_teacher_is_refused_or_spread(recipe, tmp_path):
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 5}
    ViTModel(ViTConfig(**shape, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(tmp_path)
    deep = recipe()
    deep.teacher.name = str(tmp_path)
    with pytest.raises(ValueError, match="teacher.spread=true"):
        build_learner(deep)
    deep.teacher.spread = True
    learner, _ = build_learner(deep)
    assert learner.distillation.pairs[-1][1] == 4


def test_diverging_training_stops_and_says_so(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match="Lower training.learning_rate"):
        run(recipe(learning_rate=1e30, max_grad_norm=0.0, max_steps=30), tmp_path / "run")


def test_a_run_directory_is_not_overwritten(recipe, tmp_path):
    run(recipe(), tmp_path / "run")
    with pytest.raises(ValueError, match="already holds a run"):
        run(recipe(), tmp_path / "run")
    with pytest.raises(ValueError, match="no checkpoint"):
        run(recipe(), tmp_path / "other", resume=True)


def test_rows_beyond_the_context_are_refused(recipe, tmp_path):
    long = recipe()
    long.data.sequence_length = 10_000_000
    with pytest.raises(ValueError, match="context holds"):
        run(long, tmp_path / "run")


def test_planned_steps_fit_the_budget_and_never_exceed_the_recipe(recipe, tmp_path):
    learner, processor = build_learner(recipe())
    rows = PackedSequences([load_source(recipe().data.sources[0].path)], processor, 128)
    arguments = training_arguments(recipe(max_steps=100), tmp_path)
    before = {name: tensor.clone() for name, tensor in learner.state_dict().items()}
    assert steps_that_fit(learner, rows, arguments, minutes=10, num_image_only_steps=2) == 100
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.state_dict().items())
    with pytest.raises(ValueError, match="raise max_minutes"):
        steps_that_fit(learner, rows, arguments, minutes=1e-6, num_image_only_steps=2)
    assert all(parameter.grad is None for parameter in learner.parameters())


def test_each_part_has_its_learning_rate_and_the_eyes_slow_down_when_words_join(recipe, tmp_path):
    wanted = recipe(max_steps=8, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=1)
    wanted.teacher.distill_only_steps, wanted.teacher.vision_lr_scale, wanted.lora.num_blocks = 4, 0.5, 3
    wanted.learning_rates.lora_b, wanted.learning_rates.heads = 4e-3, 2e-3
    rates = {}

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates[state.global_step] = {group["part"]: group["lr"] for group in optimizer.param_groups}

    run(wanted, tmp_path / "run", callbacks=[Note()])
    eyes = {("patch_embedding", True): 1e-3, ("heads", True): 2e-3, ("rest", True): 1e-3, ("lora_b", True): 4e-3}
    above = {("rest", False): 1e-3, ("lora_b", False): 4e-3}  # LoRA in the block above the teacher's two
    assert rates[0] == pytest.approx(eyes | above)
    assert rates[3] == pytest.approx({part: rate / 4 for part, rate in (eyes | above).items()})
    assert rates[7] == pytest.approx({part: rate / 2 for part, rate in eyes.items()} | above)


def test_eyes_that_were_trained_before_slow_down_from_the_start(recipe, tmp_path):
    first = recipe(max_steps=2, learning_rate=1e-3)
    first.teacher.distill_only_steps, first.lora.num_blocks = 2, 3
    run(first, tmp_path / "eyes")
    second = recipe(max_steps=3, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=0)
    second.model.llm, second.model.vora = None, str(tmp_path / "eyes")
    second.teacher.vision_lr_scale, second.lora.num_blocks = 0.1, 3
    rates = {}

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer, **kwargs):
            rates.update({group["part"]: group["lr"] for group in optimizer.param_groups})

    run(second, tmp_path / "words", callbacks=[Note()])
    assert rates[("rest", True)] == rates[("heads", True)] == pytest.approx(1e-4)
    assert rates[("rest", False)] == rates[("lora_b", False)] == pytest.approx(1e-3)
    second.training["learning_rate"] = 0.0  # so what comes out is what it began with
    begun = run(second, tmp_path / "still").model
    before = load_file(tmp_path / "eyes" / "final" / "adapter_model.safetensors")
    after = load_file(tmp_path / "still" / "final" / "adapter_model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    heads = load_file(tmp_path / "eyes" / "final" / DISTILLATION_FILE)
    assert torch.equal(begun.distillation.heads["0"][1].weight, heads["heads.0.1.weight"])
    for section, key, value, message in (
        (second.model, "patch_merge", 2, "patch_merge 2 .it has 1.* would be others"),
        (second.model, "image_attention", "causal", "image_attention causal .it has bidirectional"),
        (second.lora, "target_modules", ["q_proj"], "leave lora.target_modules out"),
        (second.teacher, "standardize", True, "tensors of the distill heads.*variance.*None there"),
    ):
        before = getattr(section, key)
        setattr(section, key, value)
        with pytest.raises(ValueError, match=message):
            build_learner(second)
        setattr(section, key, before)
    second.model.attn_implementation = "eager"
    second.model.chat_template = "{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    learner, processor = build_learner(second)
    assert learner.config.get_text_config()._attn_implementation == "eager"
    assert processor.apply_chat_template([{"role": "user", "content": "what?"}]) == "user> what?"
    second.stage, second.teacher = "finetune", None
    with pytest.raises(ValueError, match="vora merge"):
        build_learner(second)


def test_a_teacher_deeper_than_the_lora_that_a_model_has_is_refused(recipe, tmp_path):
    first = recipe(max_steps=1)
    first.lora.num_blocks = 2
    run(first, tmp_path / "eyes")
    second = recipe(max_steps=1)
    second.model.llm, second.model.vora, second.teacher.name = None, str(tmp_path / "eyes"), str(tmp_path / "vit")
    tiny.save_tiny_vit(tmp_path / "vit", num_hidden_layers=3)  # as deep as the LLM, whose third block has no LoRA
    with pytest.raises(ValueError, match="3 blocks, but only 2 of the LLM's 3"):
        build_learner(second)


def test_eyes_that_rest_stay_as_they_are_and_ask_no_teacher(recipe, tmp_path):
    first = recipe(max_steps=2)
    first.teacher.distill_only_steps, first.lora.num_blocks = 2, 3
    run(first, tmp_path / "eyes")
    second = recipe(max_steps=3, save_steps=2)
    second.model.llm, second.model.vora = None, str(tmp_path / "eyes")
    second.teacher.distill_only_steps, second.teacher.vision_lr_scale, second.lora.num_blocks = 0, 0.0, 3
    run(second, tmp_path / "words")
    lines = read_log(tmp_path / "words" / "log.jsonl")
    assert all("distill_loss" not in line and line["lm_loss"] > 0 for line in lines if "loss" in line)
    before, after = (load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("eyes", "words"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.2." in name}  # above the teacher's two
    heads = [load_file(tmp_path / name / "final" / DISTILLATION_FILE) for name in ("eyes", "words")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert not meta_model(second)[0].eyes() and meta_model(first)[0].eyes()
    second.training["max_steps"] = 4
    run(second, tmp_path / "words", resume=True)
    assert read_log(tmp_path / "words" / "log.jsonl")[-1]["step"] == 4
    shallow = recipe()
    shallow.teacher.distill_only_steps, shallow.teacher.vision_lr_scale = 0, 0.0
    with pytest.raises(ValueError, match="0 parameters are left to learn: block 1 is taught.*lora.num_blocks above 2"):
        run(shallow, tmp_path / "none")
    with pytest.raises(ValueError, match="vision_lr_scale 0 cannot say what shall rest"):
        load_recipe({**shallow.model_dump(), "teacher": {"name": "x", "weight": 0, "vision_lr_scale": 0}})


def test_the_last_pair_alone_can_teach(recipe):
    wanted = recipe()
    wanted.teacher.pairs = "last"
    assert build_learner(wanted)[0].distillation.pairs == [(1, 1)]


def test_distilling_alone_runs_no_block_above_the_teachers(recipe):
    learner, processor = build_learner(recipe())
    rows = PackedSequences([load_source(recipe().data.sources[0].path)], processor, 128, distill_only_sequences=1)
    batch = rows.collate([next(iter(rows))])
    ran = []
    for index, block in enumerate(learner.vora.model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    out = learner(**batch)
    assert ran == [0, 1][: len(ran)] and len(ran) <= 2
    assert "lm_loss" not in out and float(out["distill_loss"]) > 0


def test_bf16_training_keeps_what_trains_in_fp32(recipe, tmp_path):
    half = recipe(bf16=True, max_steps=3)
    half.model.dtype = "bfloat16"
    trainer = run(half, tmp_path / "run")
    kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    exact = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    model, _ = merge_run(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # as the LLM was, and as it is planned for
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}


def test_a_run_in_fp16_merges(recipe, tmp_path):
    half = recipe(max_steps=2)
    half.model.dtype = "float16"
    run(half, tmp_path / "run")
    assert merge_run(tmp_path / "run")[0].dtype == torch.float16


def test_a_run_merges_where_its_teacher_and_its_start_are_not(recipe, llm_folder, teacher_folder, tmp_path):
    first = recipe(max_steps=2)
    first.teacher.name = str(shutil.copytree(teacher_folder, tmp_path / "vit"))
    run(first, tmp_path / "first")
    wanted, _ = merge_run(tmp_path / "first")
    wanted.save_pretrained(tmp_path / "merged")
    VoraProcessor.from_pretrained(tmp_path / "first" / "final").save_pretrained(tmp_path / "merged")
    shutil.rmtree(tmp_path / "vit")
    found, processor = merge_run(tmp_path / "first")
    assert all(torch.equal(p, found.get_parameter(name)) for name, p in wanted.named_parameters())
    second = first.model_copy(deep=True)
    second.stage, second.teacher, second.model.llm, second.model.vora = (
        "finetune",
        None,
        None,
        str(tmp_path / "merged"),
    )
    run(second, tmp_path / "second")
    trained = load_file(tmp_path / "second" / "final" / "model.safetensors")
    shutil.rmtree(tmp_path / "merged")
    found, again = merge_run(tmp_path / "second")
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in trained.items())
    assert again.image_token_id == processor.image_token_id
    first.teacher.name = str(tmp_path / "vit")
    with pytest.raises(ValueError, match="There is no ViT at .*vit: name a folder or a hub id"):
        run(first, tmp_path / "third")


@pytest.mark.parametrize(
    ("dtype", "bf16", "wanted"),
    [("float32", False, torch.float32), ("float32", True, torch.bfloat16), ("bfloat16", False, torch.bfloat16),
     ("float16", False, torch.float32)],
)  # fmt: skip
def test_the_teacher_computes_in_bf16_where_the_run_does(recipe, tmp_path, dtype, bf16, wanted):
    changed = recipe(bf16=bf16)
    changed.model.dtype = dtype
    learner, _ = build_learner(changed)
    planned, _ = meta_model(changed)
    for made in (learner, planned):
        assert {parameter.dtype for parameter in made.teacher.parameters()} == {wanted}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_either_precision_chosen_for_a_processor_makes_a_run(recipe, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("vora.train.throughput.cpu_dtype", lambda: dtype)
    values = recipe(max_steps=3).model_dump()
    values["training"].pop("use_cpu")
    chosen = load_recipe(values, [f"{key}={value}" for key, value in precision_overrides().items()])
    trainer = run(chosen, tmp_path / "run")
    assert trainer.args.bf16 == (dtype == "bfloat16") and trainer.model.vora.dtype == getattr(torch, dtype)


def test_teacher_and_heads_stay_out_of_the_student(llm_folder, teacher_folder):
    teacher = vora.Teacher.from_pretrained(teacher_folder)
    model = vora.VoraForConditionalGeneration.from_llm(llm_folder, teacher=teacher)
    before = set(model.state_dict())
    distillation = BlockwiseDistillation(block_pairs(2, 2), tiny.SHAPE["hidden_size"], 24)
    Objective(model, None, teacher, distillation)
    assert set(model.state_dict()) == before
