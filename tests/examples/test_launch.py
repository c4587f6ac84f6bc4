"""The launch files are valid, and what they start is a command that torchrun and vora understand."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.run import get_args_parser
from typer.main import get_command

from vora.cli import app

FOLDER = Path(__file__).parents[2] / "examples" / "launch"
PRINT = '#!/bin/sh\nprintf "%s\\n" "$@"\n'
HEAD = "node0:29500"
STANDS_FOR = {"torchrun": PRINT, "srun": '#!/bin/sh\nexec "$@"\n', "scontrol": "#!/bin/sh\necho node0; echo node1\n"}
ENVIRONMENT = {
    "HEAD": "node0", "NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7",
    "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "node0\nnode1",
    "RECIPE": "mine.yaml",
}  # fmt: skip


def started(script, folder, *arguments):
    """What a script hands to torchrun: (its options, those of `vora train`)."""
    for name, text in STANDS_FOR.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = os.environ | ENVIRONMENT | {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", script, *arguments], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    options = get_args_parser().parse_args(done.stdout.splitlines())
    assert options.module and options.training_script == "vora.cli" and options.training_script_args[0] == "train"
    train = get_command(app).commands["train"]
    return options, train.make_context("train", options.training_script_args[1:]).params


@pytest.mark.parametrize("name", ["one_node.sh", "several_nodes.sh", "slurm.sbatch"])
def test_scripts_start_what_is_understood(name, tmp_path):
    out = tmp_path / "runs" / "mine"
    for whole in (False, True):
        more = ["--resume"] if whole and name != "slurm.sbatch" else []
        options, params = started(FOLDER / name, tmp_path, "mine.yaml", str(out), "training.max_steps=5", *more)
        is_alone = name == "one_node.sh"
        assert (options.nnodes, options.rdzv_endpoint) == (("1:1", "") if is_alone else ("2", HEAD))
        assert options.standalone == is_alone and options.nproc_per_node == "gpu"
        assert str(params["out"]) == str(out) and params["resume"] == whole
        assert "training.max_steps=5" in params["overrides"]
        (out / "checkpoint-5").mkdir(parents=True, exist_ok=True)
        (out / "checkpoint-5" / "trainer_state.json").touch()


def test_the_skypilot_task_starts_what_is_understood(tmp_path):
    task = yaml.safe_load((FOLDER / "skypilot.yaml").read_text())
    script = tmp_path / "run.sh"
    script.write_text(task["run"].replace("/runs/", f"{tmp_path}/runs/"))
    options, params = started(script, tmp_path)
    assert options.nnodes == "2" and options.rdzv_endpoint == HEAD and options.nproc_per_node == "8"
    assert str(params["out"]) == f"{tmp_path}/runs/mine" and not params["resume"] and "RECIPE" in task["envs"]
    subprocess.run(["bash", "-n"], input=task["setup"], text=True, check=True)


def test_accelerate_reads_its_configuration():
    config = load_config_from_file(str(FOLDER / "accelerate.yaml"))
    assert config.num_processes == 8 and config.mixed_precision == "no" and config.distributed_type == "MULTI_GPU"
