"""What trains in each stage, from which start and how fast; a run learns, and leaves what it promises."""

import shutil
from io import StringIO
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import get_peft_model_state_dict
from rich.console import Console
from runs import COLOURS, close_to, losses, run, write_lines
from safetensors.torch import load_file, safe_open
from tiny_teachers import tiny_vit
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from vora import Teacher, attach_vision_lora
from vora.checkpoint import merge_run
from vora.checkpoint.layout import HEADS_FILE
from vora.checkpoint.lineage import read_card
from vora.data.readers import load_source
from vora.data.stream import PackedSequences
from vora.model.processing_vora import SPELT
from vora.train import sharding
from vora.train.estimate import check_start
from vora.train.from_recipe import training_arguments
from vora.train.plan.meta_model import meta_model
from vora.train.recipe import load_recipe
from vora.train.run_log import read_log
from vora.train.stages import build_objective, check_trainable, load_vit, lora_depth, trainable_counts
from vora.train.throughput import precision_overrides, steps_that_fit


class Rates(TrainerCallback):
    """Notes the learning rate of each part at each step."""

    def __init__(self):
        self.found = {}

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.found[state.global_step] = {group["part"]: group["lr"] for group in optimizer.param_groups}


@pytest.fixture(scope="module")
def vision(recipe, tmp_path_factory):
    """A run of two steps that only distill, with LoRA in all three blocks of the LLM, of which a teacher has two."""
    first, folder = recipe(max_steps=2, learning_rate=1e-3), tmp_path_factory.mktemp("vision") / "run"
    first.lora.num_blocks = 3
    console = Console(record=True, file=StringIO(), width=300)
    run(first, folder, console=console)
    assert "Warning: all 2 steps only distill, so that no text is learned" in console.export_text()
    return folder


def going_on(recipe, vision, **training):
    """A recipe that goes on with a run, without steps that only distill."""
    second = recipe(**training)
    second.model.llm, second.model.vora, second.lora.num_blocks = None, str(vision), 3
    second.teacher.distill_only_steps = 0
    return second


def test_only_the_stage_s_parts_train(recipe):
    wanted = recipe()
    wanted.teacher.pairs = "last"
    objective, _ = build_objective(wanted)
    assert objective.distillation.pairs == [(1, 1)]  # can teach alone
    counts = trainable_counts(objective)
    assert counts["LLM"][0] == 0
    assert all(counts[part][0] == counts[part][1] > 0 for part in ("vision LoRA", "distill heads"))
    assert "teacher" not in " ".join(name for name, _ in objective.named_parameters())
    objective.vora.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="should train none of the LLM"):
        check_trainable(objective, "pretrain")


def test_a_deeper_teacher_is_refused_or_spread(recipe, tmp_path):
    tiny.save_tiny_vit(tmp_path, num_hidden_layers=5)
    deep = recipe()
    deep.teacher.name = str(tmp_path)
    with pytest.raises(ValueError, match="teacher.spread=true"):
        build_objective(deep)
    has_lora = attach_vision_lora(tiny.tiny_vora("llama"), rank=2, num_blocks=2)
    with pytest.raises(ValueError, match="3 blocks, but only 2 of the LLM's 3"):
        lora_depth(recipe(), has_lora, Teacher(tiny_vit("vit", num_hidden_layers=3)))
    deep.teacher.spread = True
    objective, _ = build_objective(deep)
    assert objective.distillation.pairs[-1][1] == 4


def test_the_teacher_computes_in_bf16_where_the_run_does(recipe):
    for dtype, bf16 in (("float32", False), ("float32", True), ("bfloat16", False), ("float16", False)):
        changed = recipe(bf16=bf16)
        changed.model.dtype = dtype
        wanted = torch.bfloat16 if bf16 or dtype == "bfloat16" else torch.float32
        for made in (load_vit(changed), meta_model(changed)[0].teacher):
            assert {parameter.dtype for parameter in made.parameters()} == {wanted}


def test_each_part_has_its_learning_rate_and_vision_slows_down_after_its_first_steps(recipe, tmp_path):
    wanted = recipe(max_steps=6, learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=1)
    wanted.teacher.distill_only_steps, wanted.teacher.vision_lr_scale, wanted.lora.num_blocks = 4, 0.5, 3
    wanted.learning_rates.lora_b, wanted.learning_rates.heads = 4e-3, 2e-3
    rates = Rates()
    run(wanted, tmp_path / "run", callbacks=[rates])
    vision = {("patch_embedding", True): 1e-3, ("heads", True): 2e-3, ("rest", True): 1e-3, ("lora_b", True): 4e-3}
    above = {("rest", False): 1e-3, ("lora_b", False): 4e-3}  # LoRA in the block above the teacher's two
    assert rates.found[0] == pytest.approx(vision | above)
    assert rates.found[3] == pytest.approx({part: rate / 4 for part, rate in (vision | above).items()})
    assert rates.found[5] == pytest.approx({part: rate / 2 for part, rate in vision.items()} | above)


def test_vision_that_was_trained_before_slows_down_from_the_start(recipe, vision, tmp_path):
    options = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
    second = going_on(recipe, vision, max_steps=2, learning_rate=1e-3, **options)
    second.teacher.vision_lr_scale = 0.1
    begun, _ = build_objective(second)
    before, after = load_file(vision / "final" / "adapter_model.safetensors"), get_peft_model_state_dict(begun.student)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    heads = load_file(vision / "final" / HEADS_FILE)
    assert torch.equal(begun.distillation.heads["0"][1].weight, heads["heads.0.1.weight"])
    rates = Rates()
    run(second, tmp_path / "language", callbacks=[rates])
    last = rates.found[1]
    assert last[("rest", True)] == last[("heads", True)] == pytest.approx(1e-4)
    assert last[("rest", False)] == last[("lora_b", False)] == pytest.approx(1e-3)


def test_what_a_trained_model_is_cannot_be_asked_otherwise(recipe, vision):
    second = going_on(recipe, vision)
    for section, key, value, message in (
        (second.model, "patch_merge", 2, "patch_merge 2 .it has 1.* would change it"),
        (second.model, "axial_positions", True, "axial_positions True .it has False"),
        (second.model, "image_attention", "causal", "image_attention causal .it has bidirectional"),
        (second.lora, "rank", 4, "LoRA of rank 8 in 3 blocks, but the recipe asks for rank 4 in 3"),
        (second.lora, "target_modules", ["q_proj"], "leave lora.target_modules out"),
        (second.teacher, "standardize", True, "tensors of the distill heads.*variance.*None there"),
    ):
        before = getattr(section, key)
        setattr(section, key, value)
        with pytest.raises(ValueError, match=message):
            build_objective(second)
        setattr(section, key, before)
    second.model.attn_implementation = "eager"
    second.model.chat_template = "{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    second.model.image_markers = ("<|image>", "<image|>")
    objective, processor = build_objective(second)
    assert objective.config.get_text_config()._attn_implementation == "eager"
    assert processor.apply_chat_template([{"role": "user", "content": "what?"}]) == "user> what?"
    marked = processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "image": None}]}])
    assert marked.replace(SPELT, "") == f"user> <|image>{processor.image_token}<image|>"
    second.stage, second.teacher = "finetune", None
    with pytest.raises(ValueError, match="vora merge"):
        build_objective(second)


def test_frozen_vision_stays_as_it_is_and_asks_no_teacher(recipe, vision, tmp_path):
    second = going_on(recipe, vision, max_steps=3, save_steps=2)
    second.teacher.vision_lr_scale = 0.0
    run(second, tmp_path / "language")
    lines = read_log(tmp_path / "language" / "log.jsonl")
    assert all("distill_loss" not in line and line["lm_loss"] > 0 for line in lines if "loss" in line)
    folders = (vision / "final", tmp_path / "language" / "final")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.2." in name}  # above the teacher's two
    heads = [load_file(folder / HEADS_FILE) for folder in folders]
    assert not [name for name in heads[0] if not torch.equal(heads[0][name], heads[1][name])]
    assert not meta_model(second)[0].vision_parameters() and meta_model(recipe())[0].vision_parameters()
    second.training["max_steps"] = 4
    run(second, tmp_path / "language", resume=True)
    assert read_log(tmp_path / "language" / "log.jsonl")[-1]["step"] == 4
    shallow = recipe()
    shallow.teacher.distill_only_steps, shallow.teacher.vision_lr_scale = 0, 0.0
    with pytest.raises(ValueError, match="0 parameters are left to learn: block 1 is paired.*lora.num_blocks above 2"):
        run(shallow, tmp_path / "none")
    with pytest.raises(ValueError, match="vision_lr_scale 0 cannot say what is frozen"):
        load_recipe({**shallow.model_dump(), "teacher": {"name": "x", "weight": 0, "vision_lr_scale": 0}})


def test_it_learns_what_only_the_images_tell_and_says_it(recipe, data_file, tmp_path):
    learned = recipe(max_steps=100, learning_rate=1e-2, lr_scheduler_type="linear").model_dump()
    learned["lora"]["num_blocks"] = 3
    images = [data_file.replace("train.jsonl", f"{name}.png") for name in COLOURS]
    learned["sample_generations"] = [{"image": image, "question": "which?"} for image in images]
    run(load_recipe(learned), tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert seen[100][0] < 0.5 * seen[3][0] and seen[100][1] < 0.5 * seen[1][1]
    assert read_log(tmp_path / "run" / "sample_generations.jsonl") == [{"step": 100, "answers": [*COLOURS]}]


def test_checkpointed_blocks_train_alike(recipe, tmp_path):
    run(recipe(max_steps=3), tmp_path / "kept")
    for num_blocks in (True, 2):
        trainer = run(recipe(max_steps=3, gradient_checkpointing=num_blocks), tmp_path / f"recomputed-{num_blocks}")
        flags = [block.gradient_checkpointing for block in trainer.model.vora.model.blocks]
        assert flags == [True, True, num_blocks is True]
        assert losses(tmp_path / f"recomputed-{num_blocks}") == close_to(losses(tmp_path / "kept"), abs=1e-5)


def losses_of_micro_batches(values, num, folder, name):
    """What two steps log under a name, first in one batch, then in so many micro-batches."""
    sizes = {"one": {"per_device_train_batch_size": num},
             "more": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": num}}  # fmt: skip
    for part, size in sizes.items():
        run(load_recipe(values | {"training": values["training"] | {"max_steps": 2} | size}), folder / part)
    return [[line[name] for line in read_log(folder / part / "log.jsonl")] for part in sizes]


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_gradient_accumulation_equals_one_large_batch(recipe, tmp_path, balance):
    values = recipe().model_dump()
    values["teacher"] |= {"weight": 0.0, "distill_only_steps": 0}
    values["data"]["answer_balance"] = balance
    first, second = losses_of_micro_batches(values, 2, tmp_path, "answer_loss" if balance else "lm_loss")
    assert len(first) == 2 and first == pytest.approx(second, rel=1e-4)
    every = read_log(tmp_path / "one" / "log.jsonl")[0]["lm_loss"]
    assert first[0] == pytest.approx(every, rel=0.3)  # divided by the weights: label tokens would make it far smaller


def test_a_run_on_few_answers_says_so_at_its_start_and_in_its_report(recipe, tmp_path, data_file):
    values = recipe(max_steps=3).model_dump()
    values["data"]["sources"] = [{"path": data_file}] * 20
    console = Console(record=True, file=StringIO(), width=300)
    run(load_recipe(values), tmp_path / "run", console=console)
    found = "of 160 answers looked at only 4 are different"
    assert f"Warning: {found}" in console.export_text()
    assert f"**Warning**: {found}" in (tmp_path / "run" / "report.md").read_text()


def test_micro_batches_of_text_alone_do_not_raise_the_loss(recipe, tmp_path, data_file):
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "blue red green " * 9}] * 8)
    values = recipe(learning_rate=0.0).model_dump()
    values["teacher"], values["lora"]["text_kl_weight"] = None, 1.0
    values["data"]["sources"] = [{"path": data_file, "weight": 1}, {"path": texts, "weight": 1}]
    first, second = losses_of_micro_batches(values, 8, tmp_path, "lm_loss")
    assert first == pytest.approx(second, rel=1e-4)


def test_two_stages_leave_what_they_promise_and_merge_where_their_starts_are_gone(recipe, teacher_folder, tmp_path):
    first, one = recipe(save_steps=3), tmp_path / "one"
    first.teacher.name = str(shutil.copytree(teacher_folder, tmp_path / "vit"))
    run(first, one, draws=True)
    names = {path.name for path in one.iterdir()}
    assert {"recipe.yaml", "versions.json", "log.jsonl", "loss.png", "report.md", "final", "checkpoint-3"} <= names
    assert not list(one.rglob("bad_samples.jsonl"))
    steps = {name: read_card(one / name)["stages"][0]["steps"] for name in ("checkpoint-3", "checkpoint-6", "final")}
    assert steps == {"checkpoint-3": 3, "checkpoint-6": 6, "final": 6}
    for path in one.rglob("adapter_model.safetensors"):
        with safe_open(path, "pt") as file:
            assert not [name for name in file.keys() if "vit" in name or "head" in name]
    shutil.rmtree(tmp_path / "vit")
    model, processor = merge_run(one)
    base, llm = AutoModelForCausalLM.from_pretrained(first.model.llm), model.to_llm()
    assert {n: p.shape for n, p in llm.state_dict().items()} == {n: p.shape for n, p in base.state_dict().items()}
    assert not torch.equal(llm.model.layers[0].self_attn.q_proj.weight, base.model.layers[0].self_attn.q_proj.weight)
    model.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")

    second = recipe(max_steps=2, learning_rate=1e-3)
    second.stage, second.teacher, second.model.llm = "finetune", None, None
    second.model.vora = str(tmp_path / "merged")
    run(second, tmp_path / "two")
    trained = load_file(tmp_path / "two" / "final" / "model.safetensors")
    shutil.rmtree(tmp_path / "merged")
    found, again = merge_run(tmp_path / "two")
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in trained.items())
    assert again.image_token_id == processor.image_token_id
    changed = [n for n, p in found.named_parameters() if not torch.equal(p, model.get_parameter(n))]
    assert len(changed) > 0.9 * len(list(found.parameters()))
    with pytest.raises(ValueError, match="teacher.name .*vit: there is no .*vit"):
        run(first, tmp_path / "three")


def test_diverging_training_stops_and_says_so(recipe, tmp_path):
    with pytest.raises(FloatingPointError, match="Lower training.learning_rate"):
        run(recipe(learning_rate=1e30, max_grad_norm=0.0, max_steps=30), tmp_path / "run")


def test_planned_steps_fit_the_budget_and_sequences_the_context(recipe, tmp_path):
    objective, processor = build_objective(recipe())
    rows = PackedSequences([load_source(recipe().data.sources[0].path)], processor, 128)
    arguments = training_arguments(recipe(max_steps=100), tmp_path)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    assert steps_that_fit(objective, rows, arguments, minutes=10, num_distill_only=2) == 100
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.state_dict().items())
    with pytest.raises(ValueError, match="raise max_minutes"):
        steps_that_fit(objective, rows, arguments, minutes=1e-6, num_distill_only=2)
    assert all(parameter.grad is None for parameter in objective.parameters())
    long = recipe()
    long.data.sequence_length = 10_000_000
    with pytest.raises(ValueError, match="context holds"):
        run(long, tmp_path / "run")


def saved_llm(folder, family, **changes):
    tokenizer = tiny.tiny_tokenizer()
    shape = tiny.SHAPE | tiny.FAMILIES[family] | {"vocab_size": len(tokenizer)} | changes
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_sequences_are_no_longer_than_a_sliding_window(recipe, tmp_path):
    found = recipe(max_steps=3)
    found.model.llm = saved_llm(tmp_path / "llm", "mistral", sliding_window=64)
    with pytest.raises(ValueError, match="sequence_length is 128, but the LLM's sliding window holds 64 tokens"):
        check_start(found, tmp_path / "run", False)
    values = found.model_dump()
    values["data"]["sequence_length"] = "auto"
    run(load_recipe(values), tmp_path / "run")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.sequence_length <= 64


def test_an_llm_attends_by_default_as_transformers_has_it_attend(recipe, tmp_path):
    found = recipe(max_steps=3)
    found.model.llm = saved_llm(tmp_path / "llm", "gemma2", sliding_window=256)  # without sdpa in transformers 5.23
    run(found, tmp_path / "run")
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").exists()


def test_fsdp_in_bf16_sums_losses_and_gradients_in_float32():
    state = SimpleNamespace(fsdp_plugin=None, distributed_type=None)
    accelerator = SimpleNamespace(state=state, mixed_precision="bf16")
    sharding.shard(accelerator, SimpleNamespace(fsdp_plugin_args={"fsdp_version": 2}))
    policy = state.fsdp_plugin.mixed_precision_policy
    assert (
        policy.param_dtype == torch.bfloat16 and policy.reduce_dtype == torch.float32 and policy.output_dtype is None
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_trains_is_in_fp32_whichever_precision_suits_the_machine(recipe, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("vora.train.throughput.cpu_dtype", lambda: dtype)
    values = recipe(max_steps=3).model_dump()
    values["training"].pop("use_cpu")
    chosen = load_recipe(values, [f"{key}={value}" for key, value in precision_overrides().items()])
    trainer = run(chosen, tmp_path / "run")
    assert trainer.args.bf16 == (dtype == "bfloat16") and trainer.model.vora.dtype == getattr(torch, dtype)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    exact = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in exact.values()} == {torch.float32}
    model, _ = merge_run(tmp_path / "run")
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}  # as the LLM was, and as it is planned for
    assert {b.dtype for name, b in model.named_buffers() if "inv_freq" in name} == {torch.float32}
