"""Text sampled from an LLM itself, for `lora.text_kl_weight`.

    python examples/text_from_llm.py smollm2-135m --num 500 --out text.jsonl
    python examples/text_from_llm.py smollm2-135m --num 500 --kind document --out documents.jsonl

A conversation: the LLM is given the beginning of a user's turn and writes the question, then the answer (Magpie,
arXiv 2406.08464); turns are written and end as in training (`VoraProcessor`). A document: it is given what separates
documents. A file that exists is continued. Needs no data.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel

from vora import VoraProcessor
from vora.build.base_llm import load_llm

MARK = "\u2042"  # stands where a turn's text goes
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>", "<s>", "<bos>")  # of documents, in pre-training
Rows: TypeAlias = Iterator[dict[str, Any]]
MAX_EMPTY_ROUNDS = 20  # in a row, before it gives up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm", help="alias, folder or hub id of an LLM")
    parser.add_argument("--kind", choices=["conversation", "document"], default="conversation")
    parser.add_argument("--num", type=int, default=2000, help="lines in the file at the end")
    parser.add_argument("--out", type=Path, default=Path("text.jsonl"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--question-tokens", type=int, default=64, help="longer questions are thrown away")
    parser.add_argument("--answer-tokens", type=int, default=160, help="of answers and documents; then cut")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    llm = load_llm(options.llm, dtype=torch.bfloat16).eval()
    llm = llm.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = VoraProcessor.from_llm(options.llm)
    processor.end_turns_of(llm)
    seen = set(options.out.read_text().splitlines()) if options.out.exists() else set()
    sample = conversations if options.kind == "conversation" else documents
    empty_rounds = 0
    while len(seen) < options.num:
        torch.manual_seed(options.seed + len(seen) + empty_rounds)
        lines = dict.fromkeys(map(json.dumps, sample(llm, processor, options)))
        new = [line for line in lines if line not in seen][: options.num - len(seen)]
        with options.out.open("a") as file:
            file.writelines(f"{line}\n" for line in new)
        seen.update(new)
        print(f"{len(seen)} of {options.num} {options.kind}s", flush=True)
        empty_rounds = 0 if new else empty_rounds + 1
        if empty_rounds == MAX_EMPTY_ROUNDS:
            cure = "" if options.kind == "document" else ": raise --question-tokens, or take --kind document"
            raise SystemExit(f"{empty_rounds} rounds of {options.batch} brought no new {options.kind}{cure}.")


def conversations(llm: PreTrainedModel, processor: VoraProcessor, options: argparse.Namespace) -> Rows:
    """Yields rows with one question and its answer."""
    begun = processor.apply_chat_template([{"role": "user", "content": MARK}]).partition(MARK)[0]
    found = continued(llm, processor, [begun] * options.batch, options.question_tokens)
    questions = dict.fromkeys(text for text, ended in found if ended and len(text.split()) >= 3)
    turns = [[{"role": "user", "content": question}] for question in questions]
    if not turns:
        return
    prompts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    for turn, (answer, ended) in zip(turns, continued(llm, processor, prompts, options.answer_tokens)):
        if not ended:  # only its whole sentences
            answer = answer[: max(answer.rfind(mark) for mark in ".!?") + 1]
        if answer:
            yield {"messages": [*turn, {"role": "assistant", "content": answer}]}


def documents(llm: PreTrainedModel, processor: VoraProcessor, options: argparse.Namespace) -> Rows:
    """Yields rows of plain text, as the LLM's pre-training had it."""
    tokenizer = processor.tokenizer
    known = tokenizer.get_vocab()
    begin = next((token for token in SEPARATORS if token in known), tokenizer.bos_token or tokenizer.eos_token)
    for text, _ in continued(llm, processor, [begin] * options.batch, options.answer_tokens):
        if len(text.split()) >= 10:
            yield {"text": text}


@torch.inference_mode()
def continued(
    llm: PreTrainedModel, processor: VoraProcessor, prompts: list[str], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """How each prompt goes on, sampled, to the end of the turn: list of (text, whether it ended by itself)."""
    tokenizer, ends = processor.tokenizer, torch.as_tensor(llm.generation_config.eos_token_id, device=llm.device)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(llm.device)
    how = {"do_sample": True, "temperature": 1.0, "top_p": 0.95, "pad_token_id": tokenizer.pad_token_id}
    rows = llm.generate(**inputs, **how, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [(text.strip(), ended) for text, ended in zip(texts, torch.isin(rows, ends).any(1).tolist())]


if __name__ == "__main__":
    main()
