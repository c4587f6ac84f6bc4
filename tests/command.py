"""The command line without the seconds that a process of its own would import for."""

import contextlib
import io
import os
import sys
from types import SimpleNamespace
from unittest import mock

import datasets.config
import huggingface_hub.constants

from vora import cli

WIDTH = 300  # of the terminal


def vora(*arguments, cwd=".", input=""):
    """`vora ARGUMENTS` in this process."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["vora", *map(str, arguments)]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(input)))
        stack.enter_context(mock.patch.dict(os.environ))
        for settings in (datasets.config, huggingface_hub.constants):  # both have read the environment
            stack.enter_context(mock.patch.object(settings, "HF_HUB_OFFLINE", True))
        stack.enter_context(mock.patch.object(cli.console, "_width", WIDTH))
        stack.callback(os.chdir, os.getcwd())
        os.chdir(cwd)
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
    return SimpleNamespace(returncode=status, stdout=stdout.getvalue(), stderr=stderr.getvalue())
