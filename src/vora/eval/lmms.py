"""The field's benchmarks on our models: lmms-eval finds this module by its entry point (extra `lmms`).

lmms-eval --model vora --model_args pretrained=MODEL --tasks mme --batch_size 8
"""

from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from vora.checkpoint.pretrained import committed_model
from vora.data.schema import Sample
from vora.eval.scoring.generate import batches, free_answers, prompt_of_messages
from vora.eval.scoring.teacher_forced import score_answers
from vora.serve.engine import load_model

AT_ONCE = 512  # requests whose images are in memory together
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")  # of a task's arguments


class VoraForTasks(lmms):
    """Answers tasks that give a context and its images, freely (`generate_until`) or by likelihood.

    Args:
        pretrained: a VoRA model, folder or hub id; by default the one that comes with the package.
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
        pretrained=None,
        batch_size=8,
        device=None,
        min_image_tokens=None,
        max_image_tokens=None,
        max_new_tokens=64,
        **unknown,
    ):
        super().__init__()
        if unknown := {name: value for name, value in unknown.items() if name != "max_batch_size"}:
            raise ValueError(f"--model_args {', '.join(unknown)} are unknown: there are pretrained, device, "
                             "min_image_tokens, max_image_tokens and max_new_tokens.")  # fmt: skip
        self.accelerator = Accelerator(cpu=device == "cpu")
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        model, self.processor = load_model(pretrained or committed_model(), min_image_tokens, max_image_tokens)
        self.model = model.to(self.accelerator.device)
        self.batch_size, self.max_new_tokens = int(batch_size), int(max_new_tokens)

    @property
    def device(self):
        return self.model.device

    def generate_until(self, requests):
        """One answer per request, greedy unless the task's generation arguments say otherwise."""
        answers = [None] * len(requests)
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
                    text = _cut(text, kwargs[index].get("until"))
                    count = len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
                    answers[index] = GenerationResult(text, TokenCounts(len(prompts[place]), count))
                    self.cache_hook.add_partial("generate_until", (requests[index].args[0], kwargs[index]), text)
                shown.update(len(batch))
        shown.close()
        return answers

    def loglikelihood(self, requests):
        """(negative log-likelihood of the continuation with the end of its turn, whether a greedy model says exactly
        that) per request. The sign is lmms-eval's, whose multiple choice takes the smallest; and so is the wrapping:
        version 0.7.3 turns bare pairs into text, for any model."""
        found = [None] * len(requests)
        shown = tqdm(total=len(requests), desc="Likelihoods", disable=self.rank != 0)
        for start in range(0, len(requests), AT_ONCE):
            records = [self._told(request) for request in requests[start : start + AT_ONCE]]
            for batch in score_answers(self.model, self.processor, records):
                for index, told in batch.items():
                    found[start + index] = GenerationResult((-float(told.log_probs[0]), told.right[0]))
                shown.update(len(batch))
        shown.close()
        return found

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("Tasks of several rounds are not supported: choose tasks of one.")

    def generation_kwargs(self, request):
        """A request's own generation arguments."""
        return dict(request.args[1])

    def messages(self, request):
        """A request's conversation up to the answer, its images first."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        images = _images(doc_to_visual(self.task_dict[task][split][doc_id]), request)
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": context}]
        return [{"role": "user", "content": content}]

    def _told(self, request):
        """A request's images, context and continuation as a record."""
        context, continuation, doc_to_visual, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        told = continuation(document) if callable(continuation) else continuation
        conversation = [
            {"role": "user", "content": context},
            {"role": "assistant", "content": told.strip()},
        ]
        return Sample(f"{task} {doc_id}", _images(doc_to_visual(document), request), [conversation])

    def _batches(self, lengths, extra):
        for batch in batches(lengths, self.device, extra):
            for start in range(0, len(batch), self.batch_size):
                yield batch[start : start + self.batch_size]


class VoraForMessages(VoraForTasks):
    """Answers tasks that give whole conversations, in which images stand where they belong."""

    is_simple = False

    def generation_kwargs(self, request):
        return dict(request.args[2])

    def messages(self, request):
        _, doc_to_messages, _, doc_id, task, split = request.args
        found = []
        for message in doc_to_messages(self.task_dict[task][split][doc_id]):
            content = [
                part if part["type"] == "text" else {"type": "image", "image": _images([part["url"]], request)[0]}
                for part in message["content"]
            ]
            found.append({"role": message["role"], "content": content})
        return found


def _images(visuals, request):
    for visual in visuals or []:
        if not hasattr(visual, "convert"):
            raise ValueError(
                f"{request.task_name}, document {request.doc_id}, gives a {type(visual).__name__}: images "
                "alone are understood, no videos or sounds. Choose tasks with images."
            )
    return list(visuals or [])


def _alike(kwargs):
    """Indices of requests with equal generation arguments, at most `AT_ONCE` together."""
    groups = {}
    for index, one in enumerate(kwargs):
        groups.setdefault(repr(sorted(one.items(), key=str)), []).append(index)
    return [group[start : start + AT_ONCE] for group in groups.values() for start in range(0, len(group), AT_ONCE)]


def _sampling(kwargs):
    """A task's generation arguments as `generate` takes them; a temperature of 0 is greedy."""
    sampling = {name: kwargs[name] for name in SAMPLING if kwargs.get(name) is not None}
    if not sampling.get("temperature"):
        sampling = {name: value for name, value in sampling.items() if name in ("num_beams", "repetition_penalty")}
    else:
        sampling.setdefault("do_sample", True)
    return sampling


def _cut(text, until):
    """A text up to the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop)[0] if stop else text
    return text.strip()


VORA = ModelManifest(
    "vora", simple_class_path=f"{__name__}.VoraForTasks", chat_class_path=f"{__name__}.VoraForMessages"
)
