"""What a model answers to examples: freely, by choosing, or both; as it comes, into a `Ledger`."""

import time

from vora.eval.likelihood import AnswerTree, answer_ids, candidate_scores
from vora.eval.prompting import batches, greedy_answers, prompt_of

AT_ONCE = 512  # examples whose pictures are processed, and that are sorted by length, together


def predict(model, processor, task, examples, ledger, progress=None, **images_kwargs):
    """Answer all examples that a ledger has no line of.

    Args:
        task: a `Task`, which says how its answers come about.
        progress: called with the number of examples after each batch.
        images_kwargs: for the image processor, such as `max_image_tokens`.
    """
    model.eval()
    trees = {}
    waiting = [index for index in range(len(examples)) if index not in ledger.done]
    for start in range(0, len(waiting), AT_ONCE):
        prompts = {}
        for index in waiting[start : start + AT_ONCE]:
            try:
                prompts[index] = prompt_of(processor, examples[index], **images_kwargs)
            except ValueError as error:
                ledger.add([{"index": index, "name": examples[index].name, "bad": " ".join(str(error).split())}])
        indices = list(prompts)
        extra = task.max_new_tokens if task.generates else 0
        for batch in batches([len(prompts[index]) for index in indices], model.device, extra):
            began = time.monotonic()
            chosen = [indices[place] for place in batch]
            asked = [prompts[index] for index in chosen]
            lines = [_line(index, examples[index]) for index in chosen]
            if task.generates:
                for line, text in zip(lines, greedy_answers(model, processor, asked, task.max_new_tokens)):
                    line["generated"] = text
            if task.chooses:
                _choose(model, processor, task, [examples[index] for index in chosen], asked, lines, trees)
            seconds = (time.monotonic() - began) / len(batch)
            ledger.add([line | {"seconds": round(seconds, 4)} for line in lines])
            if progress is not None:
                progress(len(batch))


def _line(index, example):
    line = {"index": index, "name": example.name, "prompt": example.prompt, "references": example.references}
    return line | ({"kind": example.kind} if example.kind else {})


def _choose(model, processor, task, examples, prompts, lines, trees):
    for example, prompt in zip(examples, prompts):
        key = (example.prompt, bool(prompt.image_inputs), example.candidates)
        if key not in trees:
            trees[key] = AnswerTree(answer_ids(processor, prompt, example.candidates))
    of_each = [trees[example.prompt, bool(prompt.image_inputs), example.candidates]
               for example, prompt in zip(examples, prompts)]  # fmt: skip
    for example, line, scores in zip(examples, lines, candidate_scores(model, processor, prompts, of_each, task.top)):
        line["chosen"] = example.candidates[int(scores.argmax())]
        order = scores.argsort()[::-1][:5]
        line["log_probs"] = {
            example.candidates[i]: round(float(scores[i]), 4) for i in order if scores[i] > float("-inf")
        }
