"""The command line: one verb, one function. Heavy imports wait until a verb needs them.

app.py        what all verbs share: how much is printed, and how they end
options.py    options that several verbs have, spelt alike
training.py   verbs before there is a model: quickstart, init, data, plan, train, ablate
models.py     verbs that write a model: merge, import-reference
answers.py    verbs that ask a model: eval, chat, inspect
engines.py    verbs for engines: serve, export, verify
"""

# isort: off
from vora.cli.app import app, console, main
from vora.cli import training, models, answers, engines  # help shows the verbs in this order
# isort: on

__all__ = ["answers", "app", "console", "engines", "main", "models", "training"]
