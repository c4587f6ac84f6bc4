"""Words by their success: a model captions pictures several times, and each caption that agrees with people's better
than the picture's others becomes likelier (self-critical sequence training, arXiv 1612.00563; its baseline is the mean
of the others, arXiv 2003.09971). The measure is CIDEr-D with the end of the caption as a word.

    torchrun --nproc_per_node 2 examples/self_critical.py EYES RECIPE data.folder=FOLDER \\
      --captions 'FOLDER/flickr8k/train-*.parquet' --out OUT

EYES: as `vora merge --eyes-out` writes them, which OUT is too; RECIPE: words.yaml, say, whose rows go on being learned
beside, so that names, questions and text stay. LoRA up to --first-block and the patch embedding rest: what is seen
stays as it is, what is said of it changes. Without torchrun it is one process.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import DynamicCache, get_linear_schedule_with_warmup

from vora.adapt.over_llm import save_eyes
from vora.data.augment import augmented
from vora.data.packing import collate_rows, share_prefixes
from vora.data.sources import load_source
from vora.data.stream import PackedBatches
from vora.eval.caption_scores import CiderD, words_of
from vora.eval.prompting import padded, prompt_of_messages
from vora.model.stretches import by_stretch_on_cpu
from vora.train.checkpoints import trained_folder
from vora.train.recipe import load_recipe
from vora.train.run import open_sources, packed_rows, training_arguments
from vora.train.stages import build_learner
from vora.train.text_energy import TextEnergy, moments_of_text

END = "</s>"  # as a word: a caption that breaks off agrees less
AUGMENT = {"crop": 0.64, "flip": True}
SAVE_STEPS = 50


def main():
    options = read_options()
    starts = ["model.llm=null", "model.chat_template=null", f"model.vora={options.eyes}"]
    recipe = load_recipe(options.recipe, [*starts, f"training.max_steps={options.steps}", *options.settings])
    recipe.teacher = None  # what is seen rests, so nobody teaches it
    arguments = training_arguments(recipe, options.out)
    accelerator = Accelerator(cpu=arguments.use_cpu, mixed_precision="bf16" if arguments.bf16 else "no")
    critic = Critic(load_source(options.captions, prompts=recipe.data.prompts), arguments, options)
    learner, processor = build_learner(recipe)
    refuse_words_before_the_answer(processor)
    by_stretch_on_cpu(learner.vora, accelerator.device)
    learner.to(accelerator.device)
    rows = packed_rows(recipe, open_sources(recipe.data), processor, arguments)
    energy = TextEnergy(moments_of_text(learner, rows)) if recipe.lora.spare_text else None
    learned = rest_below(learner, options.first_block)
    optimizer = optimizer_of(learned, recipe, arguments)
    schedule = get_linear_schedule_with_warmup(optimizer, arguments.get_warmup_steps(options.steps), options.steps)
    batches, spread, start = iter(PackedBatches(rows, arguments.per_device_train_batch_size)), [], time.monotonic()
    torch.manual_seed(arguments.seed + accelerator.process_index)  # captions are drawn
    for step in range(1, options.steps + 1):
        optimizer.zero_grad()
        pictures = critic.pictures()
        captions, ended = critic.captions_of(learner.vora, processor, pictures, accelerator)
        rewards = critic.rewards(pictures, captions, ended)
        gains = over_the_others(rewards)
        spread.append(float(accelerator.reduce(torch.tensor(gains.std(), device=accelerator.device), "mean")))
        batch, gains = said_again(processor, pictures, captions, ended, gains / max(np.mean(spread), 1e-6))
        with accelerator.autocast():
            loss = policy_loss(learner.vora, batch, gains, options.temperature, accelerator.device)
        loss.backward()
        with accelerator.autocast():
            losses = learner(**on_device(next(batches), accelerator.device))
        losses["loss"].backward()
        for parameter in learned.values():
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(list(learned.values()), arguments.max_grad_norm or float("inf"))
        if energy is not None:
            energy.pull(recipe.lora.spare_text)
        optimizer.step()
        schedule.step()
        said = {"step": step, "reward": rewards.mean(), "best": rewards.max(1).mean(), "ended": np.mean(ended)}
        said |= {name: float(losses[name].detach()) for name in ("answer_loss", "text_loss") if name in losses}
        if accelerator.is_main_process:
            said |= {"text_energy": energy and energy.share(), "seconds": round(time.monotonic() - start, 1)}
            report(said, captions, options.out)
            if step % SAVE_STEPS == 0 or step == options.steps:
                save(learner, processor, options, critic, step)


def read_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("eyes")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", help="key=value over the recipe's, as `vora train` takes them")
    parser.add_argument("--captions", required=True, help="pictures with several captions each, by people")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=12, help="that are captioned in a step, by each process")
    parser.add_argument("--captions-each", type=int, default=5, help="of each picture, at least two")
    parser.add_argument("--most-tokens", type=int, default=22, help="of a caption")
    parser.add_argument("--temperature", type=float, default=0.6, help="at which captions are drawn and learned")
    parser.add_argument("--first-block", type=int, default=12, help="whose LoRA learns; the taught ones are below")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.captions_each < 2:
        parser.error("--captions-each is below 2: a caption is held against the others of its picture.")
    if options.out.exists() and any(options.out.iterdir()):
        parser.error(f"{options.out} is not empty: name a new folder, so that nothing is lost.")
    if not (trained_folder(options.eyes) / "adapter_config.json").exists():
        parser.error(f"{options.eyes} has no LoRA: name a run of stage 1, or eyes of `vora merge --eyes-out`.")
    return options


class Critic:
    """Draws pictures, lets them be captioned, and says how well captions agree with what people said.

    Args:
        source: of records with one picture and several answers.
        arguments: of the training, for its seed and the part of its processes.
        options: of the command line.

    Dims: N pictures, K captions each, T tokens.
    """

    def __init__(self, source, arguments, options):
        self.source, self.options, self.num_bad = source, options, 0
        self.rng = random.Random(f"{arguments.seed}/{arguments.process_index}")
        self.references = {number: told for number in range(len(source)) if (told := self._told_of(number))}
        self.measure = CiderD(list(self.references.values()))
        self.part, self.waiting = list(self.references)[arguments.process_index :: arguments.world_size], []
        if len(self.part) < options.pictures:
            raise SystemExit(f"{len(source)} pictures are too few for {options.pictures} a step in each process.")

    def _told_of(self, number):
        """What people said of a picture, as lists of words; None of a bad row."""
        try:
            return [[*words_of(turns[-1]["content"]), END] for turns in self.source[number].conversations]
        except ValueError:
            self.num_bad += 1

    def pictures(self):
        """Some of this process's pictures, each once before one comes again: list of N (number, record). Bad ones are
        counted and left out."""
        found, failed = [], 0
        while len(found) < self.options.pictures:
            if not self.waiting:
                self.waiting = self.rng.sample(self.part, len(self.part))
            number = self.waiting.pop()
            try:
                found.append((number, augmented(self.source[number], self.rng, **AUGMENT)))
            except ValueError as error:
                self.num_bad, failed = self.num_bad + 1, failed + 1
                if failed > len(self.part):
                    raise SystemExit(f"{failed} pictures in a row are bad, the last: {error}") from None
        return found

    @torch.no_grad()
    def captions_of(self, vora, processor, pictures, accelerator):
        """Captions drawn at the temperature: list of N lists of K texts; and bool[N, K], True = came to an end."""
        each, vora = self.options.captions_each, vora.eval()
        prompts = [prompt_of_messages(processor, question_of(record)) for _, record in pictures]
        pad = processor.tokenizer.pad_token_id
        inputs = padded(prompts, pad, accelerator.device)
        mask = inputs["attention_mask"]
        position = (mask.cumsum(-1) - 1).clip(min=0)
        cache = DynamicCache(config=vora.config.get_text_config())
        with accelerator.autocast():
            states = vora.model(**inputs, position_ids=position, past_key_values=cache).last_hidden_state[:, -1]
            cache.batch_repeat_interleave(each)  # the pictures were read once
            states, mask, position = (x.repeat_interleave(each, 0) for x in (states, mask, position[:, -1:]))
            ends, told = torch.tensor(processor.end_ids, device=mask.device), []
            ended = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
            while len(told) < self.options.most_tokens and not ended.all():
                logits = vora.logits(states).float() / self.options.temperature
                logits[:, processor.image_token_id] = -torch.inf
                token = torch.multinomial(logits.softmax(-1), 1)[:, 0].where(~ended, pad)
                told.append(token.where(~torch.isin(token, ends), pad))
                ended |= torch.isin(token, ends)
                position, mask = position + 1, torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
                inputs = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": position}
                states = vora.model(**inputs, past_key_values=cache).last_hidden_state[:, -1]
        texts = processor.tokenizer.batch_decode(torch.stack(told, 1), skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        return [texts[i : i + each] for i in range(0, len(texts), each)], ended.reshape(-1, each).cpu().numpy()

    def rewards(self, pictures, captions, ended):
        """CIDEr-D of each: float[N, K]."""
        words = [
            [words_of(text) + ([END] if whole else []) for text, whole in zip(*of_picture)]
            for of_picture in zip(captions, ended)
        ]
        return np.array([self.measure.scores(row, self.references[n]) for row, (n, _) in zip(words, pictures)])


def over_the_others(rewards):
    """What each caption's reward is above the mean of its picture's others: float[N, K]."""
    return rewards - (rewards.sum(1, keepdims=True) - rewards) / (rewards.shape[1] - 1)


def refuse_words_before_the_answer(processor):
    """Raise SystemExit for chat templates that begin answers with words of their own, such as an empty thought."""
    asked = [{"role": "user", "content": "what?"}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    whole = processor.apply_chat_template([*asked, {"role": "assistant", "content": "yes"}])
    if not whole[len(prompt) :].lstrip().startswith("yes"):
        raise SystemExit(f"The chat template begins an answer with {whole[len(prompt) :][:40]!r}, which is not drawn.")


def optimizer_of(learned, recipe, arguments):
    """AdamW with the recipe's rates for LoRA's A and B."""
    rates = {False: arguments.learning_rate, True: recipe.learning_rates.lora_b or arguments.learning_rate}
    groups = [
        {"params": [p for name, p in learned.items() if ("lora_B" in name) == is_b], "lr": rate}
        for is_b, rate in rates.items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, arguments.adam_beta2), weight_decay=arguments.weight_decay)


def question_of(record):
    """What is asked of a picture, as messages with the opened picture."""
    return record.messages(record.open_images(), record.conversations[0][:-1])


def rest_below(learner, first_block):
    """Only LoRA from a block on goes on learning: {name: parameter} of it.

    Raises:
        SystemExit: there is none.
    """
    for part in [learner.vora.model.patch_embedding, *learner.vora.model.blocks[:first_block]]:
        part.requires_grad_(False)
    learned = {name: parameter for name, parameter in learner.named_parameters() if parameter.requires_grad}
    if not learned:
        raise SystemExit(f"0 pairs lie from block {first_block} on: lower --first-block.")
    return learned


def said_again(processor, pictures, captions, ended, gains):
    """The captions as a batch for a forward pass, a row for each picture, and what each token shall gain: float[L], in
    the order of the batch's targets. Captions are made tokens anew, nearly always the drawn ones; an end that was not
    drawn gains nothing, nor does an empty caption."""
    samples, row_gains = [], []
    for (_, record), texts, whole, gain in zip(pictures, captions, ended, gains):
        question, said, images = question_of(record), [], None
        for text in texts:
            said.append(processor.training_sample([*question, {"role": "assistant", "content": text or "."}], images))
            images = {name: said[0][name] for name in ("pixel_values", "image_grid_thw")}
        sample = share_prefixes(said)
        places, each = np.arange(len(sample["targets"])), np.zeros(len(sample["targets"]))
        for text, end, is_whole, value in zip(texts, sample["ends"], whole, gain):
            path = (sample["targets"] != -100) & (places <= end) & (end <= sample["seen_until"])
            each[path] = value if text else 0.0
            each[end] *= is_whole
        samples.append(sample)
        row_gains.append(each[sample["targets"] != -100])
    batch = collate_rows([[sample] for sample in samples], max(len(s["targets"]) for s in samples), 0)
    batch.pop("num_samples")
    return batch, torch.from_numpy(np.concatenate(row_gains)).float() / gains.size


def policy_loss(vora, batch, gains, temperature, device):
    """Its gradient makes what gains likelier, at the temperature at which it was drawn: float[]."""
    inputs = on_device(batch, device)
    targets = inputs.pop("targets")
    wanted = targets != -100
    states = vora.train().model(**inputs, use_cache=False).last_hidden_state[wanted]
    surprise = torch.nn.functional.cross_entropy(
        vora.logits(states).float() / temperature, targets[wanted], reduction="none"
    )
    return (gains.to(device) * surprise).sum()


def on_device(batch, device):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


def report(said, captions, out):
    """A line of the log, and now and then what is said."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "a") as log:
        log.write(json.dumps(said) + "\n")
    if said["step"] % 10 == 1:
        print(f"step {said['step']}: reward {said['reward']:.3f}; {captions[0]}", flush=True)


def save(learner, processor, options, critic, steps):
    """Eyes, with the card that they had and a word on this."""
    save_eyes(learner.student, processor, options.out)
    card = trained_folder(options.eyes) / "README.md"
    if card.exists():
        told = (
            f"Then {steps} of {options.steps} steps of words by their success (`examples/self_critical.py`, CIDEr-D "
            f"against the captions of {len(critic.references):,} pictures; {critic.num_bad} bad ones left out)."
        )
        (options.out / "README.md").write_text(f"{card.read_text()}\n{told}\n")


if __name__ == "__main__":
    main()
