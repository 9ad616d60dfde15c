"""Packages that are verbs as well: `visrl.train` is the folder of training, and `visrl.train(…)` trains.

Python makes a package an attribute of the one above it as soon as anything of it is imported, so that a function of the
same name would be there before `import visrl.train.config` and gone after it. The package takes the call instead, by a
class of its own, as Python's data model lets a module have one. Knows no verb.
"""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """A package that hands a call on to one function of one of its modules, which is imported then."""

    _verb: tuple[str, str]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function()(*args, **kwargs)

    def function(self) -> Any:
        """The function that a call of the package is handed on to."""
        module, name = self._verb
        return getattr(import_module(f"{self.__name__}.{module}"), name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function())


def make_callable(package: str, module: str, function: str) -> None:
    """Have a call of the package `package` be one of `function` in its module `module`."""
    made = sys.modules[package]
    made.__class__ = CallablePackage
    made._verb = module, function  # type: ignore[attr-defined]
