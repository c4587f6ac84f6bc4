"""What a run left: opened again, merged, its eyes alone, and the card of what is made of it."""

from pathlib import Path

import torch

from vora.baselines.llava import kind_of_student
from vora.build.lora import is_unmerged, load_vision_lora, merge_vision_lora
from vora.checkpoint.adapter import is_adapter, load_adapter, named_llm, processor_of_adapter, save_adapter
from vora.checkpoint.card import CardFacts, harmless, read_card, write_card
from vora.checkpoint.card_text import NOT_STATED
from vora.checkpoint.run_directory import is_run, last_step, trained_folder
from vora.distill.objective import LOSSES
from vora.model.image_processing_vora import VoraImageProcessor
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe import load_recipe
from vora.train.run_log import read_log
from vora.train.stages import build_objective
from vora.train.trainer import load_student


def merge_run(run_directory, llm=None):
    """The trained model of a run, ready to be saved and used: LoRA merged (stage 1), or as it is (stage 2); in the
    precision that the run's recipe has for the LLM.

    Args:
        run_directory: of `vora train`, or a folder with an unmerged model, such as `vora import-reference` writes, or
            with eyes without their LLM (`vora.checkpoint.adapter`).
        llm: to put such eyes over, if not the one that they name.

    Returns:
        (model, processor); of an unmerged model without a tokenizer the processor is its image part, or None.

    Raises:
        ValueError: the directory holds no run, or one that has no trained weights yet; or an LLM is given that has no
            use.
    """
    model, processor = _merged(Path(run_directory), llm)
    if isinstance(processor, VoraProcessor):
        processor.end_turns_of(model)  # of whatever it is made
    return model.eval(), processor


def _merged(directory, llm):
    over_llm = not is_run(directory) and is_adapter(directory)
    if llm is not None and not over_llm:
        raise ValueError(f"{directory} has its own LLM: leave --llm out.")
    if is_unmerged(directory):
        model, processor = merge_vision_lora(load_vision_lora(directory)), None
        if (directory / "processor_config.json").exists():
            processor = VoraProcessor.from_pretrained(directory)
        elif (directory / "preprocessor_config.json").exists():
            processor = VoraImageProcessor.from_pretrained(directory)
        return model, processor
    if over_llm:
        return merge_vision_lora(load_adapter(directory, llm=llm)), processor_of_adapter(directory, llm)
    check_is_run(directory)
    recipe, folder = load_recipe(directory / "recipe.yaml"), trained_folder(directory)
    dtype = getattr(torch, recipe.model.dtype)
    if recipe.stage == "finetune":  # it is all there
        return kind_of_student(folder).from_pretrained(folder, dtype=dtype), VoraProcessor.from_pretrained(folder)
    if recipe.model.llm is not None and recipe.model.encoder is None:  # no teacher is needed, nor what it started from
        model = load_adapter(folder, dtype, recipe.model.llm).float()
        processor = VoraProcessor.from_pretrained(folder)
    else:
        learner, processor = open_run(directory)
        model = learner.student
    model = merge_vision_lora(model)  # in fp32
    for parameter in model.parameters():  # buffers stay: those of rotary positions need all their digits
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, processor


def open_run(run_directory, teacher=None):
    """The learner of a run with what it last saved, in fp32 whatever it trained in, with its teacher and heads.

    Args:
        teacher: where the recipe's teacher lies now, if it has moved since; a folder of another name is another
            teacher, which the heads were not trained for, and is not taken.

    Returns:
        (learner in eval mode, processor).

    Raises:
        ValueError: the directory holds no run, or one that has no trained weights yet.
    """
    directory = Path(run_directory)
    check_is_run(directory)
    folder = trained_folder(directory)
    recipe = load_recipe(directory / "recipe.yaml", ["model.dtype=float32"])
    if teacher is not None and recipe.teacher is not None and Path(teacher).name == Path(recipe.teacher.name).name:
        recipe.teacher.name = teacher
    learner, processor = build_objective(recipe)
    load_student(learner, folder)
    return learner.eval(), processor


def check_is_run(directory):
    """Raise ValueError for what is no directory of a run."""
    if not is_run(directory):
        raise ValueError(f"{directory} holds no recipe.yaml: it is no run directory of `vora train`.")


def check_has_adapter(run_directory):
    """Raise ValueError unless a directory is that of a run whose eyes can be sent without their LLM."""
    recipe = load_recipe(Path(run_directory) / "recipe.yaml") if is_run(run_directory) else None
    if recipe is None or recipe.stage != "pretrain" or recipe.model.encoder is not None:
        what = "no run of vora train" if recipe is None else f"a run of stage {recipe.stage}"
        what += " with an encoder" if recipe is not None and recipe.model.encoder is not None else ""
        raise ValueError(
            f"{run_directory} is {what}: only runs of stage pretrain, without an encoder, have eyes apart from their "
            "LLM. Leave --adapter-out out."
        )


def write_adapter(folder, run_directory):
    """Write what a run of stage 1 has added to its LLM, in the precision that it trained the LLM in, with its card."""
    learner, processor = open_run(run_directory)
    save_adapter(learner.student, processor, folder, load_recipe(Path(run_directory) / "recipe.yaml").model.dtype)
    merge_command = f"vora merge THIS_FOLDER{'' if named_llm(folder) else ' --llm LLM'} -o my-vora"
    write_run_card(folder, run_directory, merge_command=merge_command)


def first_llm(recipe):
    """The LLM that a chain of runs began with, or None if that is not known here."""
    while recipe.model.llm is None and is_run(recipe.model.vora):
        recipe = load_recipe(Path(recipe.model.vora) / "recipe.yaml")
    return recipe.model.llm


@harmless
def write_run_card(
    folder, run_directory, steps=None, evaluation=(), merge_command="vora merge RUN -o my-vora", asks_hub=True
):
    """Write the card of a model that comes from a run.

    Args:
        folder: where the model has just been saved: RUN/final or a checkpoint, the merged model, or its language part.
        run_directory: of the run, or an unmerged model.
        steps: how many it took, if it has only just ended; otherwise what it saved says so.
        evaluation, merge_command, asks_hub: see `CardFacts`.
    """
    directory = Path(run_directory)
    if not is_run(directory):  # imported or received, and merged now: what is known stands on its own card
        return write_card(folder, CardFacts(made="folded", stage="pretrain", source=str(directory)))
    recipe, saved = load_recipe(directory / "recipe.yaml"), trained_folder(directory)
    # What was noted when the run ended, where its data lay and perhaps the hub could be asked
    before = (read_card(saved) if steps is None else None) or {}
    noted = before.get("stages", [{}])[-1]
    if steps is None:
        steps = noted.get("steps") or (last_step(saved) if saved.name != "final" else recipe.training["max_steps"])
    sources = noted.get("data") or [{"name": source.path, "weight": source.weight} for source in recipe.data.sources]
    log = directory / "log.jsonl"
    lines = [line for line in read_log(log) if line["step"] <= steps]
    logged = lines[-1] if lines else {}
    is_merged = recipe.stage == "pretrain" and not (Path(folder) / "adapter_config.json").exists()
    facts = CardFacts(
        made="merged" if is_merged else "trained",
        stage=recipe.stage,
        base_llm=first_llm(recipe),
        teacher=recipe.teacher.name if recipe.teacher else None,
        encoder=recipe.model.encoder,
        source=recipe.model.vora and str(trained_folder(recipe.model.vora)),
        data=[(source["name"], source["weight"]) for source in sources],
        recipe=noted.get("recipe") or recipe.model_dump(mode="json"),
        steps=steps,
        samples_seen=logged.get("samples_seen"),
        losses={name: logged[name] for name in LOSSES if name in logged},
        logged_step=logged.get("step"),
        evaluation=list(evaluation),
        merge_command=merge_command,
        asks_hub=asks_hub,
        licences={name: known for name, known in before.get("licences", {}).items() if known != NOT_STATED},
    )
    write_card(folder, facts)
