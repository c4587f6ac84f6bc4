"""`import vora` is light, changes nothing, and yet the auto classes know VoRA, whichever was imported first."""

import pytest
from tiny import command_line

import vora


def test_import_and_help_are_light_and_leave_the_environment():
    code = """
import os, sys, time
before, start = dict(os.environ), time.process_time()
import vora
assert time.process_time() - start < 0.3
assert set(vora.__all__) <= set(dir(vora)) and dict(os.environ) == before
assert not {"torch", "transformers", "numpy", "typer", "rich"} & set(sys.modules)
from typer.testing import CliRunner
from vora.cli import app
verbs = [command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands]
whole = CliRunner().invoke(app, ["--help"]).output
for verb in verbs:
    shown = CliRunner().invoke(app, [verb, "--help"])
    assert shown.exit_code == 0 and "Usage" in shown.output and verb in whole, verb
print(*verbs, [name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    shown = command_line(code=code)
    verbs = "quickstart init data plan train ablate merge import-reference eval chat inspect serve export verify"
    assert shown.stdout == f"{verbs} []\n", shown.stderr


@pytest.mark.parametrize(  # every other test has imported transformers first
    "first",
    [
        "import vora",
        "import vora, peft",  # imports transformers when it is half done, which then imports the auto classes
        "import vora.baselines.llava",  # so does this
    ],
)
def test_auto_classes_know_vora(first, model_folder):
    code = f"""
import pickle, sys
{first}
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
assert type(model) is vora.VoraForConditionalGeneration and type(processor) is vora.VoraProcessor
assert type(pickle.loads(pickle.dumps(model))) is type(model)
assert pickle.loads(pickle.dumps(AutoConfig.for_model("vora_llava"))).model_type == "vora_llava"
assert callable(vora.VoraForConditionalGeneration.from_llm) and callable(vora.VoraProcessor.from_llm)
assert not [finder for finder in sys.meta_path if "vora" in type(finder).__module__]
"""
    assert not (result := command_line(model_folder, code=code)).returncode, result.stderr


def test_public_names_are_there_and_documented():
    for name in vora.__all__:
        assert getattr(vora, name).__doc__ or name == "__version__", name
    assert callable(vora.train) and vora.train.recipe.load_recipe is vora.load_recipe
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        vora.no_such_name


@pytest.mark.parametrize("place", ["rich.console", "typer.main.get_command", "vora.train.recipe"])
def test_ctrl_c_at_any_moment_of_a_start_ends_in_one_line(place):
    """While the command line is imported, while typer reads the command, while a verb imports."""
    code = f"""
import builtins, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
usual = builtins.__import__
def interrupted(name, *given, **options):
    if name == {place!r}:
        os.kill(os.getpid(), signal.SIGINT)
    return usual(name, *given, **options)
if {place!r}.endswith("get_command"):
    import typer.main
    typer.main.get_command = lambda app: os.kill(os.getpid(), signal.SIGINT)
builtins.__import__ = interrupted
from vora.__main__ import main
main()
"""
    ended = command_line("plan", "smollm2-135m/pretrain", code=code)
    assert (ended.returncode, ended.stderr) == (130, "Stopped.\n")


def test_version_and_how_much_is_printed():
    fail = """
import logging
from vora import cli
@cli.app.command()
def fail():
    cli.console.print("working")
    logging.getLogger("a.library").warning("careful")
    raise ValueError("no [such] thing")
cli.main()
"""
    both = [command_line("-h", code=f"import runpy; runpy.run_module('{name}', run_name='__main__')")
            for name in ("vora", "vora.cli")]  # fmt: skip
    assert all("quickstart" in one.stdout and not one.returncode for one in both)
    assert command_line("--version").stdout == f"vora {vora.__version__}\n"
    usual, quiet, verbose = (command_line(*options, "fail", code=fail).stderr for options in ([], ["-q"], ["-v"]))
    assert quiet == "error: no [such] thing\n" and usual == f"working\ncareful\n{quiet}"
    assert "careful" in verbose and "Traceback" in verbose and verbose.endswith(quiet)
