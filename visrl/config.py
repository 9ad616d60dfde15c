"""Configs: typed, flat YAML plus `key=value`. Unknown keys are errors that name the nearest known one.

Nothing here imports torch: a command must refuse a typo at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from visrl.redact import without_secrets


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key and the remedy."""


class Config(BaseModel):
    """The base of every verb's config: flat, typed, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @classmethod
    def known_keys(cls) -> set[str]:
        """The keys that this config takes."""
        return set(cls.model_fields)


AnyConfig = TypeVar("AnyConfig", bound=Config)
AnyValue = TypeVar("AnyValue")

# The type of a key that takes one value or a list of them, and holds a tuple either way.
OneOrMore = Annotated[
    tuple[AnyValue, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value)
]

# Keys that newer releases of transformers renamed or dropped, by what they are called now (None: no longer needed).
# And `critic.box`, the paper's name for an ablation.
ALIASES: dict[str, str | None] = {
    "critic.box": "use_box_critic",
    "overwrite_output_dir": None,
    "warmup_ratio": "warmup_steps",  # a float below 1 is a share of all steps
    "evaluation_strategy": "eval_strategy",
    "preprocessing_num_workers": None,
    "overwrite_cache": None,
}


def read_config(kind: type[AnyConfig], path: str | Path | None, overrides: Iterable[str] = ()) -> AnyConfig:
    """The config of `kind` from a YAML file and `key=value` overrides; values are read as YAML.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown key, or a value of the wrong type.
    """
    values = read_yaml(path) if path else {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not of the form key=value")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{override!r}: the value is not YAML; quote it if it is meant as text") from error
    return build_config(kind, values, where=str(path) if path else "the command line")


def split_arguments(config: Path | None, overrides: Iterable[str] | None) -> tuple[Path | None, list[str]]:
    """A verb's arguments: the config file may be left out, and then the first argument is an override already."""
    extra = list(overrides or [])
    if config is not None and "=" in str(config) and not config.exists():
        return None, [str(config), *extra]
    return config, extra


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, or no mapping in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"no config at {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; name a YAML file") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines")
    return values


def build_config(kind: type[AnyConfig], values: dict[str, Any], where: str) -> AnyConfig:
    """The config of `kind` with these values, old names translated.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    values = translate(values)
    known = kind.known_keys()
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ConfigError(f"{where}: {key} must be given") from error
        raise ConfigError(f"{where}: {key}: {first['msg']} (got {without_secrets(first['input'])!r})") from error


def translate(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with keys of older releases under their present names."""
    names = {key: ALIASES.get(key, key) for key in values}
    return {name: values[key] for key, name in names.items() if name is not None}
