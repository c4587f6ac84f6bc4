"""examples/serve names what is there: files, extras, options and variables. Docker itself is not run."""

import json
import re
import shlex
from pathlib import Path

import typer
import yaml

from vora.cli import app

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "examples" / "serve"
DOCKERFILE = (SERVE / "Dockerfile").read_text().replace("\\\n", " ")
OPTIONS = {name: one for one in typer.main.get_command(app).commands["serve"].params for name in one.opts}


def instructions(name):
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, flags=re.M)


def check_options(words):
    names = [word for word in words if word.startswith("-")]
    assert names and not set(names) - OPTIONS.keys()


def test_the_dockerfile_copies_what_the_package_is_built_from():
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    project = (ROOT / "pyproject.toml").read_text()
    readme = re.search(r'^readme = "(.*)"', project, flags=re.M)[1]
    included = re.search(r'force-include\]\n"(.*?)" =', project)[1]
    assert {readme, included, "pyproject.toml", "src", "requirements/tested.txt"} == copied
    assert len(re.findall(r"^torch==", (ROOT / "requirements/tested.txt").read_text(), flags=re.M)) == 1
    (extra,) = re.findall(r"ARG EXTRAS=(\w+)", DOCKERFILE)
    assert re.search(rf"^{extra} = \[", project, flags=re.M)
    for path in re.findall(r"-f (\S+)", DOCKERFILE):
        assert (ROOT / path).exists()


def test_containers_start_the_server_with_options_that_it_has():
    (entry,), (command,) = map(json.loads, instructions("ENTRYPOINT")), map(json.loads, instructions("CMD")[-1:])
    assert entry[:2] == ["vora", "serve"]
    check_options(entry[2:])
    check_options(command)
    text = (SERVE / "compose.yaml").read_text()
    service = yaml.safe_load(text)["services"]["vora"]
    check_options(service["command"])
    assert "VORA_API_KEY" in service["environment"] and "VORA_API_KEY" in OPTIONS["--api-key"].help
    build, (volume,) = service["build"], service["volumes"]
    context = SERVE / build["context"]  # as all its paths, from where compose.yaml lies
    assert context.resolve() == ROOT and (context / build["dockerfile"]).exists()
    assert not build["args"].keys() - {line.split("=")[0] for line in instructions("ARG")}
    model = re.fullmatch(r"\$\{MODEL:-(.*)\}:(/\w+):ro", volume)
    assert model and (SERVE / model[1]).resolve() == ROOT / "my-vora"
    assert service["command"][service["command"].index("--model") + 1] == model[2] == command[-1]
    (path,) = re.findall(r"compose -f (\S+) up", text)
    assert (ROOT / path).samefile(SERVE / "compose.yaml") and shlex.split(instructions("USER")[0]) == ["vora"]
