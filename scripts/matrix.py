"""Which LLMs learn to see from which teachers: every family at toy size, written into docs/matrix.md.

    python scripts/matrix.py                 # all, some minutes
    python scripts/matrix.py --llms llama gemma3_text --teachers vit --no-page

Models are tiny and random: what is tried is whether it computes the right thing, not whether it learns well.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

import tiny  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from packed import questions  # noqa: E402
from tiny import IMAGE, PATCH, generate, logits_of, prompt, text, tiny_llm, tiny_vora  # noqa: E402
from tiny_teachers import TEACHERS, tiny_vit  # noqa: E402

from vora import (  # noqa: E402
    Teacher,
    VoraForConditionalGeneration,
    VoraImageProcessor,
    attach_vision_lora,
    merge_vision_lora,  # noqa: E402
)
from vora.build.lora import keep_trained_in_fp32  # noqa: E402
from vora.data.packing import collate_sequences, places, share_prefixes  # noqa: E402
from vora.distill.blockwise import BlockwiseDistillation, block_pairs  # noqa: E402
from vora.distill.objective import Objective  # noqa: E402
from vora.model.modeling_vora import CACHE  # noqa: E402

PAGE, MARK = ROOT / "docs" / "matrix.md", "<!-- made by scripts/matrix.py -->\n"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
HEADS = {"head_dim": 8}
MORE = {  # than the tests' families: what else people bring
    "gemma": HEADS,
    "cohere2": {"logit_scale": 0.5, **tiny.WINDOW},
    "olmo": {},
    "olmo3": tiny.WINDOW,
    "glm4": HEADS,
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "ministral": {**HEADS, **tiny.WINDOW},
    "seed_oss": HEADS,
    "exaone4": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **tiny.WINDOW},
    "arcee": {},
    "apertus": {},
    "helium": HEADS,
    "hunyuan_v1_dense": HEADS,
    "ernie4_5": HEADS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**HEADS, **EXPERTS},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**HEADS, **tiny.WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {**HEADS, **EXPERTS, "shared_expert_intermediate_size": 24, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 8, "num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "bloom": {},
    "gemma3n_text": {"vocab_size_per_layer_input": 128, "num_kv_shared_layers": 0},
    "gemma4_text": {"vocab_size_per_layer_input": 128},
}  # fmt: skip
DTYPES = {"float32": 1e-4, "bfloat16": 0.06}  # the largest error that rounding makes, relative to what it is of
TWO_IMAGES = [*text(4), (2, 4, 0), (3, 3, 1), *text(5, 1)]
CHECKS = ("text", "merge", "cache", "packed", "remote code")
LOADS = """
import sys, torch
from transformers import AutoModelForImageTextToText
for folder in sys.argv[1:]:
    inputs, expected = torch.load(folder + "/expected.pt")
    try:
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        assert not type(model).__module__.startswith("vora.")
        with torch.no_grad():
            found = model(**inputs, use_cache=False).logits
        print(folder, float((found - expected).abs().max()))
    except Exception as error:
        print(folder, type(error).__name__, " ".join(str(error).split())[:200])
"""


def llm_of(family: str, dtype: torch.dtype) -> Any:
    """A tiny random LLM of a family of the tests, or of `MORE`."""
    tiny.FAMILIES.update(MORE)
    return tiny_llm(family).to(dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to what is expected; NaN where something is."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def check_text(family: str, dtype: torch.dtype) -> float:
    """Text logits of a fresh model against the LLM's: to the bit, so 0."""
    given = {"input_ids": torch.tensor([text(9)])}
    return error(logits_of(tiny_vora(llm_of(family, dtype)), **given), logits_of(llm_of(family, dtype), **given))


def check_merge(family: str, dtype: torch.dtype) -> float:
    """LoRA that does something, folded in, against LoRA beside."""
    student = attach_vision_lora(tiny_vora(llm_of(family, dtype)), rank=4, num_blocks=2)
    tiny.train_a_little(student)
    inputs = inputs_of(dtype, TWO_IMAGES)
    expected = logits_of(student, **inputs)
    return error(logits_of(merge_vision_lora(student), **inputs), expected)


def check_cache(family: str, dtype: torch.dtype) -> float:
    """A token after a cache, against all at once; in float32 also greedy answers of a padded batch, both ways."""
    vora, inputs = tiny_vora(llm_of(family, dtype)), inputs_of(dtype, TWO_IMAGES)
    next_token = torch.tensor([[text(1, 7)[0]]])
    with torch.no_grad():
        cache = getattr(vora(**inputs, use_cache=True), CACHE)
        mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        found = vora(next_token, attention_mask=mask, **{CACHE: cache}, use_cache=True).logits[:, -1]
    whole = inputs | {"input_ids": torch.cat([inputs["input_ids"], next_token], 1), "attention_mask": mask}
    if dtype == torch.float32:
        batch = inputs_of(dtype, TWO_IMAGES, text(6, 4))
        if not torch.equal(generate(vora, batch), generate(vora, batch, use_cache=False)):
            return float("inf")
    return error(found, logits_of(vora, **whole)[:, -1])


def check_packed(family: str, dtype: torch.dtype) -> float:
    """Two documents in one sequence, whose images touch, against each alone."""
    first, second = [*text(3), (2, 4, 0)], [(3, 3, 1), *text(4, 1)]
    vora, packed = tiny_vora(llm_of(family, dtype)), inputs_of(dtype, [*first, *second])
    packed |= {"attention_mask": None, "position_ids": torch.cat([torch.arange(11), torch.arange(13)])[None]}
    alone = [logits_of(vora, **inputs_of(dtype, document)) for document in (first, second)]
    return error(logits_of(vora, **packed), torch.cat(alone, 1))


def inputs_of(dtype: torch.dtype, *rows: Any) -> dict[str, Any]:
    inputs = prompt(*rows)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    return inputs


def training_step(family: str, kind: str, dtype: torch.dtype) -> float:
    """Mean norm of the gradients of a step with a teacher; NaN where a loss is missing or a weight is not finite."""
    vora = tiny_vora(llm_of(family, dtype))
    student = attach_vision_lora(vora, rank=4, num_blocks=2)
    keep_trained_in_fp32(student)
    teacher = Teacher(tiny_vit(kind).to(dtype))
    heads = BlockwiseDistillation(block_pairs(2, teacher.num_blocks), tiny.SHAPE["hidden_size"], teacher.hidden_size)
    objective = Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, heads).train()
    batch: Any = collate_sequences([[share_prefixes(questions(0, 1))]], 32, pad_token_id=0)
    window = getattr(vora.config.get_text_config(), "sliding_window", None)
    batch |= places(batch, IMAGE)
    if window and window < 32:
        batch.pop("seen_until")  # one document, and such borders may not exceed a window
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = objective(**batch)
    losses["loss"].backward()
    learned = [float(p.grad.norm()) if p.grad is not None else 0.0 for n, p in objective.named_parameters()
               if "lora_B" in n or "heads" in n or "patch_embedding.modules_to_save" in n]  # fmt: skip
    torch.optim.AdamW(trained, lr=1e-3).step()
    is_whole = {"lm_loss", "distill_loss"} <= losses.keys() and all(p.isfinite().all() for p in trained)
    return sum(learned) / len(learned) if is_whole else float("nan")


def save_for_remote_code(family: str, dtype: torch.dtype, folder: Path) -> None:
    vora, inputs = tiny_vora(llm_of(family, dtype)), inputs_of(dtype, TWO_IMAGES)
    vora.save_pretrained(folder)
    vora = VoraForConditionalGeneration.from_pretrained(folder)  # with rotary frequencies in float32, as loaded
    torch.save((inputs, logits_of(vora, **inputs)), folder / "expected.pt")


def loaded_elsewhere(folders: list[Path]) -> dict[Path, str]:
    """What a process without vora says of folders: a difference, or an error."""
    if not folders:
        return {}
    with TemporaryDirectory() as modules:
        environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "PATH": "", "HOME": modules}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # or sums are rounded in another order
        done = subprocess.run(
            [sys.executable, "-I", "-c", LOADS, *map(str, folders)], capture_output=True, text=True, env=environment
        )
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith("/"))
    return {folder: found.get(str(folder), done.stderr[-200:]) for folder in folders}


def tried(check: Callable[..., float], *given: Any) -> float | str:
    """What a check finds, or why it cannot."""
    try:
        return check(*given)
    except Exception as error:  # of whatever kind: it becomes a line of the page
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def gap(found: float | str, most: float) -> str | None:
    """Why a check failed, if it did."""
    if isinstance(found, str):
        return found[:160]
    return None if found <= most else f"off by {found:.2g}"


def of_family(family: str, teachers: list[str], scratch: Path) -> dict[str, dict[str, str | None]]:
    """{check: {dtype: why it failed, or None}}; only `build` where the LLM cannot be built."""
    results: dict[str, dict[str, str | None]] = {}
    for name, tolerance in DTYPES.items():
        dtype = getattr(torch, name)
        built = tried(lambda: tiny_vora(llm_of(family, dtype)) and 0.0)  # noqa: B023
        results.setdefault("build", {})[name] = gap(built, 0.0)
        if isinstance(built, str):
            continue
        checks = (("text", check_text, 0.0), ("merge", check_merge, tolerance), ("cache", check_cache, tolerance),
                  ("packed", check_packed, tolerance))  # fmt: skip
        for check, function, most in checks:
            results.setdefault(check, {})[name] = gap(tried(function, family, dtype), most)
        folder = scratch / f"{family}-{name}"
        why = tried(lambda: save_for_remote_code(family, dtype, folder) or 0.0)  # type: ignore[func-returns-value]  # noqa: B023
        results.setdefault("remote code", {})[name] = gap(why, 0.0)
        for kind in teachers:
            learned = tried(training_step, family, kind, dtype)
            why = learned if isinstance(learned, str) else None if learned > 0 else f"its gradients are {learned:.2g}"
            results.setdefault(kind, {})[name] = why and why[:160]
    return results


def add_remote_code(results: dict[str, dict], scratch: Path) -> None:
    folders = {folder: folder.name.rsplit("-", 1) for folder in sorted(scratch.iterdir())}
    for folder, found in loaded_elsewhere(list(folders)).items():
        family, name = folders[folder]
        results[family]["remote code"][name] = None if found == "0.0" else f"another process: {found}"


def page_of(results: dict[str, dict], teachers: list[str]) -> str:
    """Two tables in Markdown, and why what is missing is missing."""
    notes: dict[str, int] = {}

    def cell(found: dict[str, str | None] | None) -> str:
        if found is None:
            return ""
        failed = {name: why for name, why in found.items() if why}
        marks = [f"{name} [{notes.setdefault(why, len(notes) + 1)}]" for name, why in failed.items()]
        if len(failed) == len(DTYPES) and len(set(failed.values())) == 1:
            marks = [f"no [{notes[failed['float32']]}]"]  # type: ignore[index]
        elif failed:
            marks[0] = "not " + marks[0]
        return ", ".join(marks) or "yes"

    lines = ["| LLM | " + " | ".join(("build", *CHECKS)) + " | teachers |", "|---" * (len(CHECKS) + 3) + "|"]
    for family, found in results.items():
        kinds = [kind for kind in teachers if kind in found]
        good = sum(not any(found[kind].values()) for kind in kinds)
        share = f"{good} of {len(kinds)}" if kinds else ""
        cells = [cell(found.get(check)) for check in ("build", *CHECKS)]
        lines.append("| " + " | ".join([family, *cells, share]) + " |")
    lines += ["", "| teacher | LLMs that take a step with it in float32 | in bfloat16 |", "|---|---|---|"]
    for kind in teachers:
        of = [found[kind] for found in results.values() if kind in found]
        good = [sum(one[name] is None for one in of) for name in DTYPES]
        lines.append(f"| {kind} | " + " | ".join(f"{count} of {len(of)}" for count in good) + " |")
    pairs = [
        (family, kind, name, why)
        for family, found in results.items() for kind in teachers
        for name, why in found.get(kind, {}).items() if why
    ]  # fmt: skip
    lines += ["", *(f"{number}. {why.replace('|', '/')}" for why, number in notes.items())]
    lines += ["", *(f"* {family} with {kind} in {name}: {why}" for family, kind, name, why in pairs)]
    return "\n".join(lines).rstrip() + f"\n\ntransformers {transformers.__version__}, torch {torch.__version__}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = [*tiny.FAMILIES, *MORE]
    parser.add_argument("--llms", nargs="+", choices=every, default=every)
    parser.add_argument("--teachers", nargs="+", choices=[*TEACHERS], default=[*TEACHERS])
    parser.add_argument("--page", action=argparse.BooleanOptionalAction, default=True, help="write docs/matrix.md")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    results = {}
    with TemporaryDirectory() as scratch:
        for family in args.llms:
            results[family] = of_family(family, args.teachers, Path(scratch))
            missing = sum(why is not None for found in results[family].values() for why in found.values())
            print(f"{family}: {missing} gaps", flush=True)
        add_remote_code(results, Path(scratch))
    found = page_of(results, args.teachers)
    print(found)
    if args.page:
        head = PAGE.read_text().partition(MARK)[0]
        PAGE.write_text(head + MARK + "\n" + found)


if __name__ == "__main__":
    main()
