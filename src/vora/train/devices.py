"""What a run must not ask of its devices, said before any work."""


def check_one_gpu_per_process(arguments):
    """Packed batches cannot be cut for `torch.nn.DataParallel`, which transformers' Trainer would take.

    Raises:
        ValueError: one process sees several GPUs.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"One process sees {arguments.n_gpu} GPUs: start one for each with `torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m vora.cli train ...`, or show it one with CUDA_VISIBLE_DEVICES=0."
        )


def check_fsdp(recipe, are_spread, resumes=False):
    """FSDP spreads weights over processes, which then have to compute in step.

    Args:
        are_spread: whether FSDP does so, by the recipe or by an accelerate configuration.
        resumes: whether the run goes on from a checkpoint.

    Raises:
        ValueError: the recipe asks for what one process does alone, or for whole weights.
    """
    if not are_spread:
        return
    asked = {
        "lora.text_kl_weight runs the LLM once more only where a batch has text": (
            recipe.lora.text_kl_weight > 0 and recipe.stage == "pretrain"
        ),
        "watch answers in one process alone": bool(recipe.sample_generations),
        "--resume reads whole weights back": resumes,
    }
    if wrong := [what for what, is_so in asked.items() if is_so]:
        raise ValueError(
            f"{'; '.join(wrong)}: with weights that FSDP spreads that fails, or waits for ever. Train with DDP "
            "(torchrun alone, without training.fsdp), or leave it out."
        )
