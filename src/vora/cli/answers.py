"""Verbs that ask a model: with words, with a task's data, with images drawn."""

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from vora.cli.app import app, console, starting
from vora.cli.options import (
    BaseLlm,
    Columns,
    DeviceOption,
    DtypeOption,
    MaxImageTokens,
    MinImageTokens,
    ModelOption,
    RemoteCode,
    Unmerged,
    listed,
    named_columns,
    need,
    no_folders,
    out_file,
)


@app.command(name="eval")
def evaluate(
    task: Annotated[str, Option(help="captions, vqa, exact, classify, statements, probe (does it look?), text.")],
    data: Annotated[list[str], Option(help="Files, folders or datasets: all that recipes read; see `vora data`.")],
    out: Annotated[Path, out_file("JSON file of the report.")],
    more_data: Annotated[list[str] | None, Argument(metavar="[PATH]...", help="More data.")] = None,
    model: ModelOption = None,
    prompt: Annotated[str | None, Option(help="Instead of the task's own; {} takes a row's text.")] = None,
    labels: Annotated[Path | None, Option(exists=True, help="Names of all classes, one per line.")] = None,
    column: Columns = None,
    split: Annotated[str | None, Option(help="By default test, else validation, else train.")] = None,
    subset: Annotated[str | None, Option(help="Of a dataset on the Hub.")] = None,
    image_folder: Annotated[Path | None, Option(exists=True, help="Where paths of images start.")] = None,
    allow_urls: Annotated[bool, Option("--allow-urls", help="Fetch images that rows name by URL.")] = False,
    half: Annotated[
        str | None, Option(help="choose or report: of half of the images, to choose a model by one, report the other.")
    ] = None,
    held_out_by: Annotated[
        Path | None, Option(exists=True, help="Run or recipe: only images that its data.validation.share holds out.")
    ] = None,
    max_samples: Annotated[int | None, Option(min=1, help="Only the first so many of the data.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    unmerged: Unmerged = False,
    seed: Annotated[int, Option(help="Of intervals and of what a probe shows.")] = 0,
    of: Annotated[str | None, Option(help="The probed task; by default the one that the columns fit.")] = None,
    generate: Annotated[bool, Option("--generate", help="A probe also generates answers; slow.")] = False,
    against: Annotated[
        str | None, Option(help="What else a probe shows, with commas between: other, blank, shuffled, none.")
    ] = None,
    base: Annotated[str | None, Option(help="LLM that --task text compares with; else the model's own.")] = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a model on a task, with 95 % intervals; the same command goes on after a stop."""
    with starting():
        from vora.checkpoint.pretrained import committed_model
        from vora.eval.run import evaluate as run

    held_out = None
    if held_out_by is not None:
        from vora.train.from_recipe import read_held_out

        held_out = read_held_out(held_out_by)
    names = None if labels is None else [line.strip() for line in labels.read_text().splitlines() if line.strip()]
    report = run(
        model or committed_model(), task, [*data, *(more_data or ())], out,
        split=split, subset=subset, image_folder=image_folder, allow_urls=allow_urls, half=half,
        columns=named_columns(column) or None, held_out=held_out,
        min_image_tokens=min_image_tokens, max_image_tokens=max_image_tokens, device=device, dtype=dtype,
        llm=llm, unmerged=unmerged, max_samples=max_samples, seed=seed,
        prompt=prompt, labels=names, of=of, generate=generate, against=listed(against), base=base,
        console=console,
    )  # fmt: skip
    console.print(report.table())
    for text in report.examples(out):
        console.print(text, highlight=False, markup=False)
    if "verdict" in report.details:
        console.print(report.details["verdict"], highlight=False, markup=False)
    console.print(f"Wrote {', '.join(map(str, report.files(out)))}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def chat(
    images: Annotated[
        list[str] | None, Argument(metavar="[IMAGE]...", callback=no_folders, help="Paths or URLs.")
    ] = None,
    model: ModelOption = None,
    question: Annotated[str | None, Option("--question", "-q", help="Ask once instead of chatting.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, Option(min=0, help="0 answers greedily.")] = 0.0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    llm: BaseLlm = None,
    unmerged: Unmerged = False,
    web: Annotated[bool, Option("--web", help="A page in the browser, for one image.")] = False,
    url: Annotated[str | None, Option(help="The page asks this server with an OpenAI API, of the model -m.")] = None,
    api_key: Annotated[str | None, Option(envvar="VORA_API_KEY", help="Of that server.")] = None,
    host: Annotated[str, Option(help="Address of the page; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Of the page.")] = 7860,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Ask a model about images; without -q, interactively (`/help` shows what a line may be, an empty one ends), or
    with --web on a page."""
    loading: dict[str, Any] = {
        "llm": llm, "device": device, "dtype": dtype, "unmerged": unmerged,
        "min_image_tokens": min_image_tokens, "max_image_tokens": max_image_tokens,
    }  # fmt: skip
    if web:
        options = {"url": url, "api_key": api_key, **loading}
        _open_page(images or [], model, question, max_new_tokens, temperature, host, port, options)
        return
    if url is not None:
        raise ValueError("--url is of the page in the browser: add --web.")
    from vora.checkpoint.layout import read_info
    from vora.checkpoint.load import load_model
    from vora.checkpoint.pretrained import committed_model
    from vora.serve.chat import Chat
    from vora.serve.engine import Engine
    from vora.serve.terminal import NO_IMAGE, converse, open_image, print_answer, several_images

    opened = [open_image(image) for image in images or []]
    info = read_info(model or committed_model())
    loaded = load_model(info, **loading)
    conversation = Chat(Engine(*loaded), max_new_tokens, temperature)
    if question is None:
        converse(conversation, opened, console, info.max_images)
        return
    if not opened:
        console.print(f"{NO_IMAGE}: vora chat IMAGE -q QUESTION gives one.", highlight=False)
    if said := several_images(len(opened), info.max_images):
        console.print(said, highlight=False)
    print_answer(conversation, question, opened)


def _open_page(
    images: list[str], model: str | None, question: str | None, max_new_tokens: int, temperature: float, host: str,
    port: int, options: dict[str, Any],
) -> None:  # fmt: skip
    """`vora chat --web`, with the options of `chat_page`."""
    need("web", "gradio", "openai", "fastapi")
    if options["url"] and model is None:
        raise ValueError("--url needs -m MODEL, which is served there: the page shows images as its processor does.")
    if len(images) > 1:
        raise ValueError(f"The page shows one image, and {len(images)} were given: give one.")
    from vora.checkpoint.pretrained import committed_model
    from vora.model.fetch_image import fetch_image
    from vora.serve.web.run import First, chat_page

    if host not in ("127.0.0.1", "localhost", "::1"):
        console.print("Whoever reaches this machine may use the page: it asks for no password.")
    image = fetch_image(images[0], allow_urls=True) if images else None
    first = First(image, question, max_new_tokens, temperature)
    chat_page(model or committed_model(), first, host, port, console.print, **options)


@app.command()
def inspect(
    image: Annotated[str, Argument(callback=no_folders, help="Path or URL.")],
    model: ModelOption = None,
    question: Annotated[str, Option("--question", "-q", help="What to ask.")] = "Describe the image.",
    answer: Annotated[str | None, Option(help="Answer to follow; the model's own by default.")] = None,
    teacher: Annotated[str | None, Option(help="ViT to compare with: folder or hub id; else the run's own.")] = None,
    out: Annotated[Path, out_file("HTML page; its figures go beside it as JSON.")] = Path("inspect.html"),
    max_new_tokens: Annotated[int, Option(min=1, help="Longest answer, in tokens.")] = 64,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Draw how a model sees an image: its blocks beside the teacher's, and where each word of the answer looks."""
    from vora.checkpoint.load import load_model
    from vora.checkpoint.pretrained import committed_model
    from vora.distill.objective import Objective
    from vora.eval.inspect.inspection import inspect_image
    from vora.eval.inspect.page import finding, write_inspection
    from vora.eval.inspect.teacher import take_teacher
    from vora.model.fetch_image import fetch_image

    if out.suffix != ".html":
        raise ValueError(f"--out {out} names no page: give a name that ends in .html; a JSON goes beside it.")
    figures = out.with_suffix(".json")
    if figures.exists() and not out.exists():
        raise ValueError(f"{figures} is there and no page's: choose another --out, so that it is not overwritten.")
    shown, name = fetch_image(image, allow_urls=True), model or committed_model()
    vora, processor = load_model(
        name, llm=llm, min_image_tokens=min_image_tokens, max_image_tokens=max_image_tokens, device=device, dtype=dtype
    )
    objective = Objective(vora, processor.image_processor)
    pairs, remark = take_teacher(objective, name, teacher)
    found = inspect_image(objective, processor, shown, question, answer, pairs, max_new_tokens)
    write_inspection(out, found, processor.image_processor, image, name, [remark] if remark else [])
    if remark:
        console.print(remark, highlight=False, markup=False)
    console.print(f"{found.answer}\n{finding(found)}\nWrote {out}, {figures}", highlight=False, markup=False)
