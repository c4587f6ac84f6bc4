"""Which of given answers a model finds likeliest, the image being read once.

The score of an answer is its log-probability after the prompt, the sum over its tokens, end of turn included: what the
model would say it with, and not divided by its length, which would favour long names. Answers form a tree, in which
what they begin with alike stands once; a model reads that tree in one pass behind the cached prompt. And as a sum only
falls along an answer, those whose beginnings are already less likely than a whole answer are never read: the best is
found for certain, at the cost of a few. Where prompt and answer exceed an LLM's sliding window, nothing can be shared:
each answer is read in a pass of its own.

Dims: B rows, T tokens of the prompt, W nodes of the tree that are read, V vocabulary, C candidates.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from vora.data.packing import TokenSample, share_prefixes
from vora.eval.scoring.generate import Prompt, check_context_length, check_log_probs, padded, sliding_window
from vora.eval.scoring.teacher_forced import score_samples
from vora.model.modeling_vora import CACHE, VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor

FIRST_NODES, MORE_TIMES, MOST_NODES = 16, 2, 512  # read in the first pass, growth from pass to pass
TOKENS_PER_PASS = 16384  # of all rows
ROWS_OF_LOGITS = 512  # made at once


class AnswerTree:
    """Candidates' tokens as a tree. Node 0 is the prompt's end; a node stands for all tokens from there to it.

    Args:
        answers: tokens of each of C answers.

    Attributes:
        paths: of each answer its nodes.
        depth: tokens of the longest.
    """

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.tokens, self.parents = [-1], [0]
        self.children: list[dict[int, int]] = [{}]
        self.paths: list[list[int]] = []
        for answer in answers:
            node = 0
            path: list[int] = []
            for token in answer:
                if token not in self.children[node]:
                    self.children[node][token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(node)
                    self.children.append({})
                node = self.children[node][token]
                path.append(node)
            self.paths.append(path)
        self.depth = max(map(len, self.paths))


class Search:
    """What is known of one prompt's candidates.

    Args:
        always: numbers of candidates that are read even if they are not among the best.
    """

    def __init__(self, tree: AnswerTree, always: Sequence[int] = ()) -> None:
        self.tree, self.always = tree, set(always)
        self.sums = np.full(len(tree.tokens), np.nan)  # of log-probabilities, from the prompt's end to each node
        self.sums[0] = 0.0
        self.bounds = np.zeros(len(tree.paths))  # no candidate is likelier than this
        self.is_exact = np.zeros(len(tree.paths), bool)

    def update(self) -> None:
        for number, path in enumerate(self.tree.paths):
            known = [node for node in path if not np.isnan(self.sums[node])]
            self.bounds[number] = self.sums[known[-1]] if known else 0.0
            self.is_exact[number] = len(known) == len(path)

    def open(self, top: int) -> list[int]:
        """Candidates that are always read or may still be among the `top` best, the former first, likeliest first."""
        exact = np.sort(self.bounds[self.is_exact])[::-1]
        least = exact[top - 1] if len(exact) >= top else -np.inf
        order = sorted(np.argsort(-self.bounds, kind="stable"), key=lambda number: number not in self.always)
        unread = [number for number in order if not self.is_exact[number]]
        return [number for number in unread if self.bounds[number] >= least or number in self.always]

    def next_nodes(self, top: int, most: float) -> list[int]:
        """At most so many nodes to read (but one candidate's), depth first: parents stand before their children."""
        chosen: set[int] = set()
        for number in self.open(top):
            path = set(self.tree.paths[number][:-1])  # the last token is predicted, never read
            if chosen and len(chosen | path) > most:
                break
            chosen |= path
        return self._depth_first(0, chosen)

    def _depth_first(self, node: int, chosen: set[int]) -> list[int]:
        found: list[int] = []
        for child in self.tree.children[node].values():
            if child in chosen:
                found += [child, *self._depth_first(child, chosen)]
        return found

    def scores(self) -> np.ndarray:
        """float[C]: log-probabilities, -inf for those that are not among the best."""
        return np.where(self.is_exact, self.bounds, -np.inf)


def answer_ids(processor: VoraProcessor, prompt: Prompt, answers: Sequence[str]) -> list[list[int]]:
    """Tokens of each answer to a prompt, end of turn included, as training has them."""
    found = []
    for answer in answers:
        messages = [*prompt.messages, {"role": "assistant", "content": answer}]
        sample = processor.training_sample(messages, _as_arrays(prompt.image_inputs))
        labels = sample["labels"]
        found.append([int(token) for token in labels[labels != -100]])
    return found


def _as_arrays(image_inputs: dict[str, Any]) -> dict[str, np.ndarray] | None:
    return {name: np.asarray(value) for name, value in image_inputs.items()} or None


@torch.inference_mode()
def candidate_scores(
    model: VoraForConditionalGeneration,
    processor: VoraProcessor,
    prompts: Sequence[Prompt],
    trees: Sequence[AnswerTree],
    top: int | None = 1,
    always: Sequence[Sequence[int]] | None = None,
) -> list[np.ndarray]:
    """Log-probabilities of candidates after one batch of prompts.

    Args:
        trees: of each prompt's candidates.
        top: so many of the best are found for certain; None: all are read.
        always: of each prompt the numbers of candidates that are read in any case.

    Returns:
        B float[C]: exact for the `top` best, for `always`, and whatever else was read; -inf for others, less likely
        ones.

    Raises:
        ValueError: prompt and candidates exceed the LLM's context, or its logits are no numbers.
    """
    for prompt, tree in zip(prompts, trees):
        check_context_length(model, len(prompt) + tree.depth)
    # a cache can be cut back to its prompts only while it does not fill the window
    window, depth = sliding_window(model), max(tree.depth for tree in trees)
    room = window - max(map(len, prompts)) - 1 if window else float("inf")
    if room < depth - 1:
        return _scores_alone(model, prompts, trees)
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs = padded(prompts, pad, model.device)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs = model.model(**inputs, position_ids=positions, use_cache=True)
    cache = getattr(outputs, CACHE)
    top = max(len(tree.paths) for tree in trees) if top is None else top
    searches = [Search(*pair) for pair in zip(trees, always or [()] * len(trees))]
    _learn(model, outputs.last_hidden_state[:, -1:], searches, [[0]] * len(searches))
    rows, most = list(range(len(prompts))), FIRST_NODES
    while True:
        still = [row for row in rows if searches[row].open(top)]
        if not still:
            return [search.scores() for search in searches]
        if len(still) < len(rows):
            kept = torch.tensor([rows.index(row) for row in still], device=model.device)
            cache.batch_select_indices(kept)
            mask, rows = mask[kept], still
        limit = min(most, MOST_NODES, TOKENS_PER_PASS // len(rows), room)
        open_ones = [searches[row] for row in rows]
        nodes = [search.next_nodes(top, limit) for search in open_ones]
        states = _read(model, cache, mask, open_ones, nodes)
        _learn(model, states, open_ones, nodes)
        cache.crop(-states.shape[1])  # the prompts alone again
        most *= MORE_TIMES


def _scores_alone(
    model: VoraForConditionalGeneration, prompts: Sequence[Prompt], trees: Sequence[AnswerTree]
) -> list[np.ndarray]:
    """B float[C], all exact: every candidate after its prompt in a pass of its own."""

    def samples() -> Iterator[tuple[tuple[int, int], TokenSample]]:
        for row, (prompt, tree) in enumerate(zip(prompts, trees)):
            before = prompt.inputs["input_ids"]
            for number, path in enumerate(tree.paths):
                answer = [tree.tokens[node] for node in path]
                ids, labels = np.append(before, answer), np.append(np.full(len(before), -100), answer)
                sample = {"input_ids": ids, "labels": labels, **(_as_arrays(prompt.image_inputs) or {})}
                yield (row, number), share_prefixes([sample])

    found = [np.zeros(len(tree.paths)) for tree in trees]
    for batch in score_samples(model, samples()):
        for (row, number), score in batch.items():
            found[row][number] = score.log_probs[0]
    return found


def _read(
    model: VoraForConditionalGeneration,
    cache: Any,
    mask: torch.Tensor,
    searches: Sequence[Search],
    nodes: Sequence[Sequence[int]],
) -> torch.Tensor:
    """Hidden states float[B, W, D] of nodes behind the cached prompts; each sees its prompt and its own beginning."""
    count, length = mask.shape
    width = max(map(len, nodes))
    ids = np.zeros((count, width), int)
    depths = np.zeros((count, width), int)
    seen_until = np.tile(np.arange(length + width), (count, 1))
    seen_until[:, :length] = length + width - 1
    for row, (search, chosen) in enumerate(zip(searches, nodes)):
        place_of = {node: place for place, node in enumerate(chosen)}
        for node, place in place_of.items():
            parent = search.tree.parents[node]
            ids[row, place] = search.tree.tokens[node]
            depths[row, place] = 0 if parent == 0 else depths[row, place_of[parent]] + 1
            while parent:  # all that it follows is seen up to it
                seen_until[row, length + place_of[parent]] = length + place
                parent = search.tree.parents[parent]
    first = mask.sum(-1, keepdim=True)
    outputs = model.model(
        input_ids=torch.from_numpy(ids).to(mask.device),
        attention_mask=torch.cat([mask, mask.new_ones(count, width)], 1),
        position_ids=first + torch.from_numpy(depths).to(mask.device),
        past_key_values=cache,
        seen_until=torch.from_numpy(seen_until).to(mask.device),
        use_cache=True,
    )
    return outputs.last_hidden_state


def _learn(
    model: VoraForConditionalGeneration,
    states: torch.Tensor,
    searches: Sequence[Search],
    nodes: Sequence[Sequence[int]],
) -> None:
    """Take in what follows each node, of hidden states float[B, W, D]."""
    at = [(row, place) for row, chosen in enumerate(nodes) for place in range(len(chosen))]
    for start in range(0, len(at), ROWS_OF_LOGITS):
        part = at[start : start + ROWS_OF_LOGITS]
        rows, places = (torch.tensor(side, device=states.device) for side in zip(*part))
        logits = model.logits(states[rows, places]).float()
        following = [  # (row of logits, token, search, node, its child)
            (number, token, searches[row], nodes[row][place], child)
            for number, (row, place) in enumerate(part)
            for token, child in searches[row].tree.children[nodes[row][place]].items()
        ]
        numbers, tokens = (torch.tensor(side, device=states.device) for side in list(zip(*following))[:2])
        log_probs = logits[numbers, tokens] - logits.logsumexp(-1)[numbers]
        check_log_probs(model, log_probs)  # which here would mean: not read yet
        for (_, _, search, node, child), log_prob in zip(following, log_probs.tolist()):
            search.sums[child] = search.sums[node] + log_prob
    for search in searches:
        search.update()
