"""What all verbs share: the app, the console, how much is printed, and how a command ends."""

import logging
import os
import signal
import sys
import warnings
from contextlib import AbstractContextManager
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer import Option

from vora import __version__
from vora.cpu_threads import configure_cpu_threads


class Terminal(Console):
    """A console that breaks no line of text, so that a printed command can be copied; tables fit the width."""

    def print(self, *objects: Any, **options: Any) -> None:
        options.setdefault("soft_wrap", all(isinstance(one, str) for one in objects))
        super().print(*objects, **options)


class Verbs(typer.core.TyperGroup):
    """Commands that Ctrl-C ends as a signal does that a run caught itself, whatever the release of typer."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedError("Stopped.") from None


app = typer.Typer(
    name="vora",
    cls=Verbs,
    help="Vision as LoRA: language models learn to see without a vision encoder.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Terminal(stderr=True)
log = logging.getLogger("vora")
UsageError: Any = typer.BadParameter.__base__  # what typer, or click below it, raises for a wrong command line


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vora {__version__}")
        raise typer.Exit


def starting() -> AbstractContextManager[Any]:
    """Says on a terminal that a command has begun, while the libraries load."""
    return console.status("Loading torch and transformers")


@app.callback()
def start(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")
    ] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Also messages of libraries, and tracebacks.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Set how much is printed."""
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        warnings.simplefilter("default")
    console.quiet = quiet


def main() -> None:
    """Run the command line; whatever goes wrong is one line with cause and cure."""
    configure_cpu_threads()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries; ours are rich's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, about names that users never wrote
    pressed: list[bool] = []

    def on_ctrl_c(*given: Any) -> None:
        pressed.append(True)
        signal.default_int_handler(*given)

    def on_sigterm(*given: Any) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)  # in order: what was written for the time being goes

    before, before_term = signal.signal(signal.SIGINT, on_ctrl_c), signal.signal(signal.SIGTERM, on_sigterm)
    try:
        if status := app(prog_name="vora", standalone_mode=False):
            sys.exit(status)
    except UsageError as error:
        if not (message := error.format_message()):  # the help was shown, of a command without arguments
            sys.exit(error.exit_code)
        if error.ctx and "option: --" in message and any(p.name == "overrides" for p in error.ctx.command.params):
            message += "; a recipe's keys are set as training.max_steps=100"
        what = escape(f"{message} ({error.ctx.command_path if error.ctx else 'vora'} -h shows what there is)")
        _print_error(f"[bold red]error:[/bold red] {what}", error.exit_code)
    except InterruptedError as stop:
        _print_error(escape(str(stop)), 130)
    except KeyboardInterrupt:
        _print_error("Stopped.", 130)
    except SystemExit:
        if pressed:  # while typer read the command, of which it says nothing
            _print_error("Stopped.", 130)
        raise
    except Exception as error:
        if pressed:  # which a library, half imported, has made another error of
            _print_error("Stopped.", 130)
        log.info("Traceback of the error:", exc_info=True)
        known = isinstance(error, (ValueError, OSError, ArithmeticError))
        message = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename:
            cause = (error.strerror or type(error).__name__).lower()
            message = f"{error.filename}: {cause}: check the path, and who may read or write it."
        shown = message if known else f"{type(error).__name__}: {message} (vora --verbose shows where)"
        _print_error(f"[bold red]error:[/bold red] {escape(shown)}", 1)
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before_term or signal.SIG_DFL)


def _print_error(message: str, status: int) -> NoReturn:
    console.quiet = False
    console.print(message, highlight=False)
    sys.exit(status)
