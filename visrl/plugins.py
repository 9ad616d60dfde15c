"""What a user adds from outside the package, by the name `module:object`: a loss, a reward, a format, a benchmark.

The module is imported as `import module` would: from what is installed or on PYTHONPATH, and from nowhere else.
"""

from __future__ import annotations

import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from visrl.config import ConfigError


def is_plugin(name: str) -> bool:
    """Whether `name` has the form `module:object`."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_plugin(name: str, kind: str) -> Any:
    """The object that `module:object` names; `kind` says in an error what it was to be ("a loss").

    Raises:
        ConfigError: no such form, no such module, nothing of that name in it, or a module that stops as it is imported.
    """
    if not is_plugin(name):
        raise ConfigError(f"{name!r} is no {kind}; one of your own is named as module:object")
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{kind} {name!r}: there is no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from error
    except Exception as error:  # whatever a user's own code raises
        raise ConfigError(f"{kind} {name!r}: {module} stopped with {raised(error)}") from error
    try:
        return getattr(found, attribute)
    except AttributeError as error:
        raise ConfigError(f"{kind} {name!r}: {module} has no {attribute!r}") from error


def raised(error: BaseException) -> str:
    """What a user's own code raised, in a line, and where."""
    if isinstance(error, SyntaxError):
        file, line, said = error.filename, error.lineno, error.msg
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        file, line, said = frame.filename, frame.lineno, str(error)
    return f"{type(error).__name__}: {' '.join(said.split())[:300]} ({file}, line {line})"


def plugin_file(name: str) -> Path | None:
    """The file of the module of `module:object`, to tell a changed one by its hash; None where it has none, or where
    `name` is that of a row of ours.

    Raises:
        ModuleNotFoundError: there is no such module; `load_plugin` says so to the user.
    """
    file = import_module(name.partition(":")[0]).__file__ if is_plugin(name) else None
    return None if file is None else Path(file)
