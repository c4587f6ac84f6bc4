"""A run on tiny random models: it learns, and leaves what it promises."""

import json
import shutil

import pytest
import tiny
import torch
from PIL import Image
from runs import COLOURS, losses, run, write_lines
from safetensors.torch import load_file, safe_open
from transformers import AutoModelForCausalLM

from vora import VoraProcessor
from vora.checkpoint import load_model, merge_run
from vora.checkpoint.lineage import read_card
from vora.data.readers import load_source
from vora.data.stream import PackedSequences
from vora.train.from_recipe import training_arguments
from vora.train.recipe import load_recipe
from vora.train.run_log import read_log
from vora.train.stages import build_objective
from vora.train.throughput import precision_overrides, steps_that_fit


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
    tensors = []
    for path in folder.rglob("adapter_model.safetensors"):
        with safe_open(path, "pt") as file:
            tensors += file.keys()
    assert tensors and not [name for name in tensors if "vit" in name or "head" in name]


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


def test_micro_batches_of_text_alone_do_not_raise_the_loss(recipe, tmp_path, data_file):
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "blue red green " * 9}] * 8)

    def mixed(**training):
        values = recipe(max_steps=3, learning_rate=0.0, **training).model_dump()
        values["teacher"], values["lora"]["text_kl_weight"] = None, 1.0
        values["data"]["sources"] = [{"path": data_file, "weight": 1}, {"path": texts, "weight": 1}]
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


def test_diverging_training_stops_and_says_so(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match="Lower training.learning_rate"):
        run(recipe(learning_rate=1e30, max_grad_norm=0.0, max_steps=30), tmp_path / "run")


def test_sequences_beyond_the_context_are_refused(recipe, tmp_path):
    long = recipe()
    long.data.sequence_length = 10_000_000
    with pytest.raises(ValueError, match="context holds"):
        run(long, tmp_path / "run")


def test_planned_steps_fit_the_budget_and_never_exceed_the_recipe(recipe, tmp_path):
    objective, processor = build_objective(recipe())
    rows = PackedSequences([load_source(recipe().data.sources[0].path)], processor, 128)
    arguments = training_arguments(recipe(max_steps=100), tmp_path)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    assert steps_that_fit(objective, rows, arguments, minutes=10, num_distill_only_steps=2) == 100
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.state_dict().items())
    with pytest.raises(ValueError, match="raise max_minutes"):
        steps_that_fit(objective, rows, arguments, minutes=1e-6, num_distill_only_steps=2)
    assert all(parameter.grad is None for parameter in objective.parameters())


@pytest.mark.parametrize(("dtype", "bf16"), [("bfloat16", True), ("float16", False)])
def test_half_precision_keeps_what_trains_in_fp32_and_merges(recipe, tmp_path, dtype, bf16):
    half = recipe(bf16=bf16, max_steps=3)
    half.model.dtype = dtype
    trainer = run(half, tmp_path / "run")
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    exact = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    model, _ = merge_run(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}  # as the LLM was, and as it is planned for
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}


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


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_either_precision_chosen_for_a_processor_makes_a_run(recipe, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("vora.train.throughput.cpu_dtype", lambda: dtype)
    values = recipe(max_steps=3).model_dump()
    values["training"].pop("use_cpu")
    chosen = load_recipe(values, [f"{key}={value}" for key, value in precision_overrides().items()])
    trainer = run(chosen, tmp_path / "run")
    assert trainer.args.bf16 == (dtype == "bfloat16") and trainer.model.vora.dtype == getattr(torch, dtype)
