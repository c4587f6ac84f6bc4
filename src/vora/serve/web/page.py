"""The page: an image and a question in, answers out, side by side with a blank and a shuffled image."""

from collections.abc import AsyncGenerator, Sequence
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from vora.model.fetch_image import fetch_image
from vora.model.image_processing_vora import VoraImageProcessor
from vora.report.images import data_url, with_grid
from vora.serve.web.client import Answer, Server, stream_answer
from vora.serve.web.conditions import CONDITIONS, images_to_show, token_grid, with_budget
from vora.serve.web.examples import example_images
from vora.serve.web.verdict import verdict

SECONDS_KEPT = 1800  # of uploaded files
MAX_QUESTION_CHARACTERS = 4000
WAITING, NOT_ASKED = "Waiting …", "Not asked yet"
INTO_VIEW = """() => {
    document.querySelector("#answers").scrollIntoView({behavior: "smooth", block: "nearest"}); return [];
}"""
NO_IMAGE = "Drop or paste an image, or take one of the examples."


class Page:
    """What the page does; its methods are free of how it looks, and each of its updates is one tuple of outputs."""

    def __init__(
        self, server: Server, image_processor: VoraImageProcessor, max_new_tokens: int = 256, temperature: float = 0.0
    ) -> None:
        self.server, self.image_processor = server, image_processor
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def show(self, path: str | None, max_image_tokens: float, conditions: Sequence[str]) -> list[str]:
        """HTML: the remark, then for each condition the image as the model sees it and an answer to come; empty where
        it is not shown."""
        if path is None:
            return [remark(NO_IMAGE), *[""] * (2 * len(CONDITIONS))]
        try:
            shown = self._images(path, max_image_tokens, conditions)
        except ValueError as error:
            return [remark(str(error), "bad"), *[""] * (2 * len(CONDITIONS))]
        cards = [(self._figure(one, shown), not_yet(NOT_ASKED) if one in shown else "") for one in CONDITIONS]
        return [
            "" if shown else remark("Choose at least one image to show."),
            *(part for card in cards for part in card),
        ]

    async def ask(
        self, path: str | None, question: str, max_image_tokens: float, conditions: Sequence[str]
    ) -> AsyncGenerator[list[Any], None]:
        """As `show`, again with each piece of an answer; one condition after another, so that times compare."""
        page: list[Any] = self.show(path, max_image_tokens, conditions)
        question = question.strip()
        if not page[0] and not question:
            page[0] = remark("Ask a question about the image.")
        if len(question) > MAX_QUESTION_CHARACTERS:
            page[0] = remark(
                f"The question has {len(question):,} characters, the limit is {MAX_QUESTION_CHARACTERS:,}."
            )
        yield page
        if page[0]:
            return
        assert path is not None
        texts: dict[str, str] = {}
        for condition, image in self._images(path, max_image_tokens, conditions).items():
            place = 2 + 2 * CONDITIONS.index(condition)
            yield updated({place: not_yet(WAITING)})
            answers = stream_answer(
                self.server, question, image, max_new_tokens=self.max_new_tokens, temperature=self.temperature
            )
            try:
                async for answer in answers:
                    yield updated({place: answer_card(answer)})
            except ValueError as error:
                yield updated({0: remark(str(error), "bad"), place: not_yet("No answer")})
                return
            finally:
                await answers.aclose()
            texts[condition] = answer.text
        yield updated({0: remark(verdict(texts, self.temperature), "verdict")})

    def _images(self, path: str, max_image_tokens: float, conditions: Sequence[str]) -> dict[str, Image.Image]:
        try:
            image = fetch_image(path)
        except ValueError as error:  # a path on the server is nobody's business
            raise ValueError(str(error).replace(f" {path}", "")) from None
        return images_to_show(image, with_budget(self.image_processor, int(max_image_tokens)), conditions)

    def _figure(self, condition: str, shown: dict[str, Image.Image]) -> str:
        if condition not in shown:
            return ""
        rows, columns = token_grid(shown[condition], self.image_processor)
        image = with_grid(shown[condition], self.image_processor.patch_size * self.image_processor.patch_merge)
        return (
            f"<figure><figcaption><b>{escape(condition.capitalize())}</b> <span>{rows * columns} image tokens "
            f'({rows} × {columns})</span></figcaption><img alt="The {escape(condition)} as the model sees it, in '
            f'{rows} rows and {columns} columns" src="{data_url(image, "png")}"></figure>'
        )


def updated(changes: dict[int, str]) -> list[Any]:
    """All outputs of the page, of which these change."""
    return [changes.get(place, gr.skip()) for place in range(1 + 2 * len(CONDITIONS))]


def remark(text: str, kind: str = "") -> str:
    return f'<p class="remark {kind}" role="status">{escape(text)}</p>' if text else ""


def not_yet(text: str) -> str:
    return f'<p class="answer quiet">{escape(text)}</p>'


def answer_card(answer: Answer) -> str:
    """The text so far, and how fast it came."""
    facts = []
    if answer.seconds_to_first_token is not None:
        facts.append(f"first token after {answer.seconds_to_first_token:.2f} s")
    if rate := answer.tokens_per_second:
        facts.append(f"{rate:.1f} tokens/s")
    if answer.num_tokens:
        facts.append(f"{answer.num_tokens} tokens")
    text = answer.text.strip() or ("(an empty answer)" if answer.is_whole else "")
    more = "" if answer.is_whole else " more"
    return f'<p class="answer{more}">{escape(text)}</p><p class="facts">{" · ".join(facts)}</p>'


def build_page(page: Page, image: Image.Image | None = None, question: str | None = None) -> gr.Blocks:
    """The page in gradio, perhaps with an image and a question to begin with."""
    most = page.image_processor.max_image_tokens
    examples = list(example_images().items())
    with gr.Blocks(
        title=f"{page.server.title} · vora", analytics_enabled=False, delete_cache=(60, SECONDS_KEPT)
    ) as blocks:
        gr.HTML(
            f"<h1>{escape(page.server.title)}</h1><p>Ask about an image, and see whether the model looks: the same "
            "question goes to it with the image, with a blank one, and with the patches of the image shuffled.</p>",
            elem_id="head",
        )
        with gr.Row(elem_id="main"):
            with gr.Column(min_width=300, elem_id="asking"):
                source = gr.Image(
                    value=image,
                    type="filepath",
                    image_mode=None,
                    format="png",
                    sources=["upload", "clipboard"],
                    label="Image",
                    interactive=True,
                    placeholder="Drop an image here, paste one,\nor click to choose",
                    height=260,
                    buttons=[],
                    elem_id="image",
                )
                gallery = gr.Gallery(
                    [(drawn, name) for name, (drawn, _) in examples],
                    label="Examples",
                    show_label=False,
                    columns=4,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    format="png",
                    elem_id="examples",
                )
                words = gr.Textbox(
                    value=question or "Describe the image.",
                    label="Question",
                    lines=1,
                    max_lines=4,
                    elem_id="question",
                    max_length=MAX_QUESTION_CHARACTERS,
                )
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                conditions = gr.CheckboxGroup(
                    list(CONDITIONS), value=list(CONDITIONS), label="Show the model", elem_id="conditions"
                )
                budget = gr.Slider(
                    1, most, value=most, step=1, label="Most image tokens", visible=most > 1, elem_id="budget"
                )
            with gr.Column(min_width=300, elem_id="answers"):
                said = gr.HTML(remark(NO_IMAGE), elem_id="said")
                cards: list[gr.HTML] = []
                with gr.Row(elem_id="cards"):
                    for condition in CONDITIONS:
                        with gr.Column(min_width=220, elem_classes="card"):
                            cards += [gr.HTML(elem_classes="seen"), gr.HTML(elem_classes="said")]
        outputs, shown = [said, *cards], [source, budget, conditions]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        for event in (source.change, budget.release, conditions.change, blocks.load):
            event(page.show, shown, outputs, queue=False, trigger_mode="always_last", **quiet)
        gallery.select(picked, None, [source, words], queue=False, **quiet)
        buttons = [start, stop]
        begun = gr.on(
            [start.click, words.submit], lambda: being_asked(True), None, buttons, queue=False, js=INTO_VIEW, **quiet
        )
        asking = begun.then(page.ask, [source, words, budget, conditions], outputs, **quiet)
        asking.then(lambda: being_asked(False), None, buttons, queue=False, **quiet)
        ended = stop.click(lambda: being_asked(False), None, buttons, cancels=[asking], queue=False, **quiet)
        ended.then(stopped, outputs, outputs, queue=False, **quiet)
    return blocks


def picked(event: gr.SelectData) -> tuple[Image.Image, str]:
    """The example that was clicked: its image and its question."""
    return list(example_images().values())[event.index]


def being_asked(is_so: bool) -> tuple[gr.Button, gr.Button]:
    """Either of the two buttons is to be seen: ask, stop."""
    return gr.Button(visible=not is_so), gr.Button(visible=is_so)


def stopped(said: str, *cards: str) -> list[str]:
    """All outputs after a stop: what came so far stays."""
    return [
        said or remark("Stopped."),
        *(card.replace(WAITING, "Stopped").replace("answer more", "answer") for card in cards),
    ]
