"""The reference of docs/PYTHON.md, from signatures and docstrings; `python tests/python_reference.py` rewrites it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import visrl
from visrl.callable_package import CallablePackage
from visrl.config import Config
from visrl.train.fields import TrainerFields

PAGE = Path(__file__).parents[1] / "docs" / "PYTHON.md"
MARK = "Made from the docstrings by `python tests/python_reference.py`.\n"
METHODS = {"LoadedPolicy": ("ask", "roll_out", "close")}


class Plain(str):
    """A text that is shown without quotes in a signature."""

    __slots__ = ()
    __repr__ = str.__str__


def reference() -> str:
    """The reference of every public name, in the groups and the order of `visrl.NAMES`."""
    source = Path(visrl.__file__).read_text(encoding="utf-8")
    table = source[source.index("NAMES = {") : source.index("\n}\n")]
    parts = []
    for line in table.splitlines()[1:]:
        if heading := re.fullmatch(r"    # (.+)", line):
            parts.append(f"### {heading[1]}")
        elif name := re.fullmatch(r'    "(\w+)": ".+",', line):
            parts += entry(name[1])
    return "\n\n".join(parts) + "\n"


def entry(name: str) -> Iterator[str]:
    found = getattr(visrl, name)
    defined = found.function() if isinstance(found, CallablePackage) else found
    is_config = isinstance(defined, type) and issubclass(defined, Config)
    shown = "(**keys)" if is_config or _has_no_signature(defined) else signature(defined)
    yield f"#### `visrl.{name}`"
    yield f"```text\nvisrl.{name}{'' if _has_no_signature(defined) else shown}\n```"
    yield from prose(defined.__doc__)
    if is_config:
        yield "Keys, with their defaults: " + ", ".join(keys(defined)) + "."
    for method in METHODS.get(name, ()):
        function = getattr(defined, method)
        yield f"```text\n{name}.{method}{signature(function)}\n```"
        yield from prose(function.__doc__)


def keys(config: type[Config]) -> Iterator[str]:
    """The keys of a config with their defaults, where these are numbers, texts or truth values. Fields of
    `transformers.TrainingArguments` are that library's to list."""
    for key, field in config.model_fields.items():
        if not issubclass(config, TrainerFields) or key not in TrainerFields.model_fields or key == "output_dir":
            has_default = isinstance(field.default, bool | int | float | str) and field.default != ""
            yield f"`{key}={field.default!r}`" if has_default else f"`{key}`"


def _has_no_signature(defined: Any) -> bool:
    """Whether a class is not made by its user: an error, or what a function gives."""
    return isinstance(defined, type) and (issubclass(defined, Exception) or defined.__name__ in METHODS)


def signature(function: Any) -> str:
    """The parameters and what is returned, annotations without quotes, a line each where they do not fit in one."""
    found = inspect.signature(function)
    parameters = [
        one.replace(annotation=_plain(one.annotation), default=_default(one.default))
        for one in found.parameters.values()
        if one.name != "self"
    ]
    returned = inspect.Signature.empty if isinstance(function, type) else _plain(found.return_annotation)
    text = str(inspect.Signature(parameters, return_annotation=returned))
    if len(text) <= 90:
        return text
    head, returns = re.fullmatch(r"\((.*)\)( -> .+)?", text).groups()
    return "(\n    " + re.sub(r", (?=(?:\*{0,2}\w+:)|[*/](?:,|$))", ",\n    ", head) + f",\n){returns or ''}"


def _plain(annotation: Any) -> Any:
    return Plain(annotation) if isinstance(annotation, str) else annotation


def _default(value: Any) -> Any:
    return Plain("…") if " at 0x" in repr(value) else value  # a function, or what holds one


def prose(docstring: str) -> Iterator[str]:
    """A docstring as Markdown: paragraphs as they are, `Args:` and its like as lists."""
    for part in inspect.cleandoc(docstring).split("\n\n"):
        heading, _, body = part.partition("\n")
        if heading in ("Args:", "Returns:", "Raises:"):
            items = re.sub(r"\n\s{5,}", " ", body) if heading != "Returns:" else re.sub(r"\n\s+", " ", body)
            lines = [re.sub(r"^([\w, ]+): ", r"`\1`: ", line.strip()) for line in items.splitlines()]
            yield f"*{heading[:-1]}*\n\n" + "\n".join(f"- {line}" for line in lines)
        elif heading.startswith("Raises: "):
            yield f"*Raises*: {part.removeprefix('Raises: ')}"
        else:
            yield part


def page() -> str:
    """The whole page, with its reference made anew."""
    written = PAGE.read_text(encoding="utf-8")
    return written[: written.index(MARK) + len(MARK)] + "\n" + reference()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
