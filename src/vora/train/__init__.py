"""Recipes, stages and the Trainer; called, the package trains: `vora.train(recipe, run_directory)`."""

import sys
from types import ModuleType
from typing import Any


class _Train(ModuleType):
    """`vora.train` is this package, to import from, and the public function, to call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from vora.train.run import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Train
