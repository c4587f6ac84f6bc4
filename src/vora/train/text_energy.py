"""How strongly vision LoRA acts on text, and a pull towards less of it, for which no text has to be read again.

Per layer, E|s B A x|^2 / E|W x|^2 over its inputs x in text: what LoRA adds to its outputs, as a share of their own
energy. Both are sums over the second moments R = E[x xT], which are measured once, with LoRA off: so the pull is the
exact gradient over all texts that were measured, at each step, for the cost of A R.

On the eyes of this package the LLM's loss of perplexity goes with the square root of this share (docs/LOG.md,
2026-11-28), so it can be steered by it. The price is memory: D^2 floats for each kind of input of each block, which
are 0.4 GB for 135 M parameters, some 10 GB for 1.5 B.

Dims: D inputs of a layer, r = LoRA's rank.
"""

from itertools import islice

import torch

from vora.adapt.spare_text import InputMoments, energy, own_weight
from vora.data.packing import collate_rows
from vora.distill.keep_text import lora_off

FED = ("input_ids", "position_ids", "seen_until")


class TextEnergy:
    """Share and gradient of what the pairs of a model do to text.

    Args:
        read: `InputMoments` of text alone, with LoRA off (`vora.distill.keep_text.lora_off`); it is used up, so that
            no more than one of them is held twice.
    """

    def __init__(self, read):
        self.layers = []
        for owner in sorted(set(read.shared.values())):
            moment = read.mean(owner)
            kept = moment.float()
            for layer in (layer for name, layer in read.layers.items() if read.shared[name] == owner):
                self.layers.append((layer, kept, float(energy(own_weight(layer), moment))))
            del read.sums[owner]

    @torch.no_grad()
    def share(self):
        """The mean of the layers' shares, a float: 0 where LoRA leaves text alone."""
        return float(torch.stack([scale * (down * b).sum() for _, b, _, down, scale in self._pairs()]).mean())

    @torch.no_grad()
    def pull(self, weight):
        """Add to the gradients of A and B, where they have some, those of weight times the sum of all layers' shares.
        It never waits for a GPU.
        """
        for a, b, across, down, scale in self._pairs(learning_alone=True):
            if a.grad is not None:
                a.grad += 2 * weight * scale * (b.float().T @ b.float()) @ across
            if b.grad is not None:
                b.grad += 2 * weight * scale * down

    def _pairs(self, learning_alone=False):
        """Of each pair, or of those with gradients, A, B, A R, B A R AT, and what makes <B, B A R AT> a share."""
        for layer, moments, own in self.layers:
            for adapter in layer.active_adapters:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                if learning_alone and a.grad is None and b.grad is None:
                    continue  # above the paired blocks, in steps of pictures alone
                across = a.float() @ moments
                yield a, b, across, b.float() @ (across @ a.float().T), layer.scaling[adapter] ** 2 / own


def moments_of_text(learner, rows, num_tokens=20_000, most_texts=4_000):
    """Reads the texts of a mixture with the LLM as it is, and counts what enters its layers.

    Args:
        learner: a `VisionLearner` with LoRA.
        rows: the `PackedRows` of the run; their position stays, and every process reads the same texts, since the pull
            joins gradients that are equal already.
        num_tokens: of text, at which reading stops; it stops after so many texts too.

    Returns:
        `InputMoments`, the same for the same data and LLM, whatever LoRA has become.

    Raises:
        ValueError: no source has text without pictures.
    """
    read, waiting = InputMoments(learner.student), []
    with torch.no_grad(), lora_off(learner):
        for sample in islice(rows.texts(), most_texts):
            waiting.append(sample)
            if len(waiting) == 8:
                _count(read, learner.vora, waiting)
                waiting = []
            if read.num_tokens >= num_tokens:
                break
        if waiting:
            _count(read, learner.vora, waiting)
    if not read.num_tokens:
        raise ValueError(
            f"{len(rows.maker.sources)} sources held 0 texts without pictures, so it is not known where text lies: "
            "add a source of text, such as JSON lines with `text`, or leave lora.spare_text out."
        )
    return read


def _count(read, vora, samples):
    """What texts, a row each, feed to the layers."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    batch = collate_rows([[sample] for sample in samples], int(lengths.max()), 0)
    with read.counted(torch.arange(int(lengths.max())) < lengths[:, None]):
        vora.model(**{name: batch[name].to(vora.device) for name in FED}, use_cache=False)
