"""The field's benchmarks on our models: lmms-eval finds this module by its entry point (extra `lmms`).

lmms-eval --model vora --model_args pretrained=MODEL --tasks mme --batch_size 8
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from vora.checkpoint.load import load_model
from vora.checkpoint.pretrained import committed_model
from vora.data.schema import Sample
from vora.eval.scoring.generate import free_answers, without_thinking
from vora.eval.scoring.prompt import batches, prompt_of_messages
from vora.eval.scoring.teacher_forced import score_answers

AT_ONCE = 512  # requests whose images are in memory together
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")  # of a task's arguments


class VoraForTasks(lmms):
    """Answers tasks that give a context and its images, freely (`generate_until`) or by likelihood.

    Args:
        pretrained: a VoRA model, folder or hub id; by default the package's own.
        batch_size: prompts at most in a batch; batches are also bounded by their tokens.
        device: cpu or cuda; by default the process's own.
        min_image_tokens, max_image_tokens: budget per image, if not the model's own.
        max_new_tokens: where a task says nothing of it.

    Raises:
        ValueError: `load_model` does not know the model, or an argument is unknown.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 8,
        device: str | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_new_tokens: int | str = 64,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown := {name: value for name, value in unknown.items() if name != "max_batch_size"}:
            raise ValueError(f"--model_args {', '.join(unknown)} are unknown: there are pretrained, device, "
                             "min_image_tokens, max_image_tokens and max_new_tokens.")  # fmt: skip
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        model, self.processor = load_model(
            pretrained or committed_model(), min_image_tokens=min_image_tokens, max_image_tokens=max_image_tokens
        )
        self.model = model.to(self.accelerator.device)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, greedy unless the task's generation arguments say otherwise."""
        answers: list[Any] = [None] * len(requests)
        kwargs = [self.generation_kwargs(request) for request in requests]
        shown = tqdm(total=len(requests), desc="Answers", disable=self.rank != 0)
        holds = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or float("inf")
        for alike in _alike(kwargs):
            prompts = [prompt_of_messages(self.processor, self.messages(requests[index])) for index in alike]
            limit = kwargs[alike[0]].get("max_new_tokens", self.max_new_tokens)
            limit = max(1, min(limit, holds - max(map(len, prompts))))  # tasks ask for up to 49,152 tokens
            sampling = _sampling(kwargs[alike[0]])
            for batch in self._batches([len(prompt) for prompt in prompts], limit):
                said = free_answers(self.model, self.processor, [prompts[i] for i in batch], limit, **sampling)
                for place, text in zip(batch, said):
                    index = alike[place]
                    text = _cut(without_thinking(text), kwargs[index].get("until"))
                    count = len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
                    answers[index] = GenerationResult(text, TokenCounts(len(prompts[place]), count))
                    self.cache_hook.add_partial("generate_until", (requests[index].args[0], kwargs[index]), text)
                shown.update(len(batch))
        shown.close()
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(negative log-likelihood of the continuation with the end of its turn, whether a greedy model says exactly
        that) per request. The sign is lmms-eval's, whose multiple choice takes the smallest; and so is the wrapping:
        version 0.7.3 turns bare pairs into text, for any model."""
        found: list[Any] = [None] * len(requests)
        shown = tqdm(total=len(requests), desc="Likelihoods", disable=self.rank != 0)
        for batch in score_answers(self.model, self.processor, enumerate(map(self._sample, requests))):
            for index, score in batch.items():
                found[index] = GenerationResult((-float(score.log_probs[0]), score.right[0]))
            shown.update(len(batch))
        shown.close()
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        raise NotImplementedError("Tasks of several rounds are not supported: choose tasks of one.")

    def generation_kwargs(self, request: Instance) -> dict[str, Any]:
        """A request's own generation arguments."""
        return dict(request.args[1])

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        """A request's conversation up to the answer, its images first."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = _images(doc_to_visual(self.task_dict[task][split][doc_id]), request)
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": context}]
        return [{"role": "user", "content": content}]

    def _sample(self, request: Instance) -> Sample:
        """A request's images, context and continuation."""
        context, continuation, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        answer = continuation(document) if callable(continuation) else continuation
        conversation = [{"role": "user", "content": context}, {"role": "assistant", "content": answer.strip()}]
        return Sample(f"{task} {doc_id}", _images(doc_to_visual(document), request), [conversation])

    def _batches(self, lengths: Sequence[int], extra: int) -> Iterator[list[int]]:
        for batch in batches(lengths, self.device, extra):
            for start in range(0, len(batch), self.batch_size):
                yield batch[start : start + self.batch_size]


class VoraForMessages(VoraForTasks):
    """Answers tasks that give whole conversations, in which images stand where they belong."""

    is_simple = False

    def generation_kwargs(self, request: Instance) -> dict[str, Any]:
        return dict(request.args[2])

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        found = []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            content = [
                part if part["type"] == "text" else {"type": "image", "image": _images([part["url"]], request)[0]}
                for part in message["content"]
            ]
            found.append({"role": message["role"], "content": content})
        return found


def _images(visuals: Sequence[Any] | None, request: Instance) -> list[Image.Image]:
    for visual in visuals or []:
        if not hasattr(visual, "convert"):
            raise ValueError(
                f"{request.task_name}, document {request.doc_id}, gives a {type(visual).__name__}: images "
                "alone are understood, no videos or sounds. Choose tasks with images."
            )
    return list(visuals or [])


def _alike(kwargs: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Indices of requests with equal generation arguments, at most `AT_ONCE` together."""
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(kwargs):
        groups.setdefault(repr(sorted(one.items(), key=str)), []).append(index)
    return [group[start : start + AT_ONCE] for group in groups.values() for start in range(0, len(group), AT_ONCE)]


def _sampling(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A task's generation arguments as `generate` takes them; a temperature of 0 is greedy."""
    sampling = {name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}
    if sampling.get("temperature"):
        return {"do_sample": True} | sampling
    return {name: value for name, value in sampling.items() if name in ("num_beams", "repetition_penalty")}


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """A text up to the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()


VORA = ModelManifest(
    "vora", simple_class_path=f"{__name__}.VoraForTasks", chat_class_path=f"{__name__}.VoraForMessages"
)
