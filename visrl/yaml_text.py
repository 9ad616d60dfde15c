"""YAML as configs are written in it: 1e-4 is a number, a key stands once, and nothing grows when it is read."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 40
MAX_VALUES = 100_000  # with every alias counted as often as it is used


class YamlError(ValueError):
    """A text that is no YAML, or more than a config can be."""


class _Loader(yaml.SafeLoader):
    """PyYAML's, with the numbers of YAML 1.2; what looks like a date is a text, as a folder's name is."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise YamlError(f"values inside values, more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) and key.value != "<<" else None
            if name is not None and name in seen:
                raise YamlError(f"the key {name[:80]!r} stands there twice, again in line {key.start_mark.line + 1}")
            seen |= {name} if name is not None else set()
        return super().construct_mapping(node, deep)


_RESOLVERS: dict[str, Any] = yaml.SafeLoader.yaml_implicit_resolvers
_Loader.yaml_implicit_resolvers = {  # YAML 1.1: 1e-4 is a text, 1:30 is ninety, and 2024-01-01 no text
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":int", ":timestamp"))]
    for first, resolvers in _RESOLVERS.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:[0-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+
        |\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$""",
        re.VERBOSE,
    ),
    list("-+.0123456789"),
)


def _whole_number(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16 if "x" in text else 10)  # 010 is ten


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def parse_yaml(text: str) -> Any:
    """The value in a YAML text.

    Raises:
        YamlError: it is none, or it is deeper or larger than any config; the message is one line.
    """
    try:
        value = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{where}{error.problem or error.context}") from error
    except YamlError:
        raise
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())[:200]) from error
    # A tag on what it does not fit (`!!int x`), a date that is none, a number of thousands of digits.
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise YamlError(f"a value that cannot be read ({str(error)[:100]})") from error
    _count(value, {}, set())
    return value


def _count(value: Any, known: dict[int, int], above: set[int]) -> int:
    """How many values `value` holds, each as often as it is reached."""
    if not isinstance(value, dict | list | set | tuple):
        return 1
    if id(value) in above:
        raise YamlError("a value that holds itself")
    if id(value) not in known:
        above.add(id(value))
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(one, known, above) for one in inner)
        above.remove(id(value))
    if known[id(value)] > MAX_VALUES:
        raise YamlError(f"aliases that stand for more than {MAX_VALUES:,} values")
    return known[id(value)]
