"""Configs: typed, flat YAML plus `key=value`. Unknown keys are errors that name the nearest known one.

Nothing here imports torch: a command must refuse a typo at once. YAML itself is read in yaml_text.py; keys of other
programs are known in foreign.py.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

from visrl.errors import UserError
from visrl.foreign import ALIASES, NO_MEANING, RENAMED, SWITCHED_OFF
from visrl.redact import hidden, without_secrets
from visrl.yaml_text import YamlError, parse_yaml

# Keys that came after manifests of work that may still go on, with the value that it was begun under.
LATER: dict[str, Any] = {
    "layout": "auto", "router_aux_loss_coef": None, "protocol_faults": [], "max_looks": None, "num_forks": 1,
    "look_price": 0.0, "punish_unfinished": False,
}  # fmt: skip
LARGEST = 2**63 - 1  # what a whole number of torch and numpy holds
MAX_BYTES = 1_000_000  # of a config file
# The configs that come with visrl: data of the package where it is installed, beside it in the source (see setup.py).
_PACKAGE = Path(__file__).parent
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


class ConfigError(UserError, ValueError):
    """A config that cannot be used; the message names the key and the remedy."""


class Config(BaseModel):
    """The base of every verb's config: flat, typed, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_look_alike(cls, value: Any, info: ValidationInfo) -> Any:
        """A truth value is no number, a number must fit, and a text must be one that a file can be named by."""
        if isinstance(value, bool) and info.field_name and _only_numbers(cls, info.field_name):
            raise ValueError("a number is wanted here")
        if isinstance(value, int) and not -LARGEST <= value <= LARGEST:
            raise ValueError("this number is larger than any that can be used")
        if isinstance(value, str | Path) and "\0" in str(value):
            raise ValueError("a text with a NUL character in it can be no name and no path")
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ValueError("a text with half a character in it (a lone surrogate) can be written nowhere")
        if isinstance(value, str) and value.startswith("~/"):  # no shell has seen it, as it stands in a file or after =
            return os.path.expanduser(value)
        return value

    @classmethod
    def known_keys(cls) -> set[str]:
        """The keys that this config takes, other names of theirs among them."""
        return set(cls.model_fields) | {old for old, new in ALIASES.items() if new in cls.model_fields}

    @classmethod
    def with_sections(cls, values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The file's `values` with what is `given` on the command line over them."""
        return {**values, **given}

    def recorded(self, exclude: Iterable[str] = ()) -> dict[str, Any]:
        """These keys but those to `exclude`, as manifests hold them: as JSON, and under the names that manifests of
        earlier releases have (the `serialization_alias` of a key that was renamed since, and `LATER` left out)."""
        values = self.model_dump(mode="json", by_alias=True, exclude=set(exclude))
        return {key: value for key, value in values.items() if key not in LATER or value != LATER[key]}


@cache
def _only_numbers(kind: type[BaseModel], field: str) -> bool:
    def parts(annotation: Any) -> set[Any]:
        inner = get_args(annotation)
        return set().union(*map(parts, inner)) if inner else {annotation}

    kinds = parts(kind.model_fields[field].annotation)
    return bool(kinds & {int, float}) and bool not in kinds and True not in kinds


AnyConfig = TypeVar("AnyConfig", bound=Config)
AnyValue = TypeVar("AnyValue")

# The type of a key that takes one value or a list of them, and holds a tuple either way.
OneOrMore = Annotated[
    tuple[AnyValue, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str | Path) else value)
]

# The type of a key that names adapters: a list, or one text with commas between them.
Adapters = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: [one.strip() for one in value.split(",")] if isinstance(value, str) else value),
]

# The type of a key that names several things in one text, with commas between them; a list of them is the same.
Listed = Annotated[
    str,
    BeforeValidator(
        lambda value: (
            ",".join(value)
            if isinstance(value, list) and value and all(isinstance(one, str) for one in value)
            else value
        )
    ),
]


# --- Keys that several verbs share ------------------------------------------------------------------------------------


class CheckpointConfig(Config):
    """Which checkpoint it is."""

    model_name_or_path: str
    """A checkpoint folder or hub name. Its processor says how boxes are written, wherever the model runs."""
    trust_remote_code: bool = False
    layout: Literal["auto", "tree", "plain"] = "auto"
    """How rows are computed in this process: as prefix trees, which share what they have in common, or each by itself
    (the plain form). "auto" is the tree wherever the model takes one."""


class SourceConfig(Config):
    """Where samples are read, beside `dataset`, of which some verbs take several."""

    dataset_dir: str = "data"
    """The folder of the `dataset_info.json` that names data sets."""
    image_root: str | None = None
    """Where the images are that rows name by a relative path."""
    max_samples: int | None = Field(None, ge=1)
    """At most so many samples of each data set."""


# --- Reading them -----------------------------------------------------------------------------------------------------


def read_config(kind: type[AnyConfig], path: str | Path | None, overrides: Iterable[str] = ()) -> AnyConfig:
    """The config of `kind` from a YAML file and `key=value` overrides; values are read as YAML.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown key, or a value of the wrong type.
    """
    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{shown(override)} is not of the form key=value")
        try:
            given[key.strip()] = parse_yaml(text)
        except YamlError as error:
            raise ConfigError(
                f"{shown(override)}: the value is not YAML ({error}); quote it if it is a text"
            ) from error
    return build_config(kind, *_both(kind, path, given, "the command line"))


def split_arguments(config: str | Path | None, overrides: Iterable[str] | None) -> tuple[Path | None, list[str]]:
    """A verb's arguments: the config file may be left out, and then the first argument is an override already. As a
    text it keeps what a `Path` would not, such as the two slashes of an address."""
    extra = list(overrides or [])
    if config is None:
        return None, extra
    if "=" in str(config) and not _exists(Path(config)):
        return None, [str(config), *extra]
    return Path(config), extra


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # longer than the name of a file can be
        return False


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, no mapping in it, or one that is larger than a config can be.
    """
    name = shown_path(path)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        own = CONFIGS.parent / path
        hint = f"; the one that comes with visrl is {own}" if own != Path(path) and _exists(own) else ""
        raise ConfigError(f"no config at {name} ({error.strerror}){hint}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{name} has more than {MAX_BYTES:,} bytes; a config is some lines of `key: value`")
    try:
        values = parse_yaml(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text; name a YAML file") from error
    except YamlError as error:
        raise ConfigError(f"{name} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must hold `key: value` lines")
    return values


def build_config(kind: type[AnyConfig], values: dict[str, Any], where: str) -> AnyConfig:
    """The config of `kind` with these values, old names translated; keys without a meaning here are named.

    Raises:
        ConfigError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    where = shown_path(where)
    values = _without_foreign(kind, translate(kind, values, where), where)
    for key in values:
        if key not in kind.model_fields:
            near = difflib.get_close_matches(key[:100], kind.model_fields, n=1) if isinstance(key, str) else []
            hint = f"did you mean {near[0]!r}?" if near else "no key of this command is like it"
            raise ConfigError(f"{where}: unknown key {shown(key)}; {hint}")
    try:
        return kind(**values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_fault(error)}") from error


def as_config(kind: type[AnyConfig], given: AnyConfig | str | Path | None, keys: Mapping[str, Any]) -> AnyConfig:
    """The config that a verb is called with in Python: a config of `kind`, the path of a YAML file, or `keys` alone;
    `keys` go over what is given.

    Raises:
        ConfigError: as `read_config` and `build_config`.
        TypeError: something else is given for a config.
    """
    if given is None or isinstance(given, str | Path):
        return build_config(kind, *_both(kind, given, keys, kind.__name__))
    if not isinstance(given, kind):
        raise TypeError(f"give a {kind.__name__}, the path of a YAML file or keys, not {type(given).__name__}")
    own = given.model_dump(exclude_unset=True)
    return build_config(kind, {**own, **translate(kind, keys, kind.__name__)}, kind.__name__) if keys else given


def _both(
    kind: type[Config], path: str | Path | None, given: Mapping[str, Any], giver: str
) -> tuple[dict[str, Any], str]:
    """A file's values with those `given` over them, whichever of a key's names each uses; and where they are from."""
    where = str(path) if path else giver
    file = translate(kind, read_yaml(path), shown_path(where)) if path else {}
    return kind.with_sections(file, translate(kind, given, giver)), where


def translate(kind: type[Config], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` with keys of older releases and of other programs under their names here; a line names those of ours.

    Raises:
        ConfigError: a key is there under both names, or its value would mean another thing under the new one.
    """
    names = {old: new for old, new in ALIASES.items() if new in kind.model_fields and old in values}
    for old, new in names.items():
        if new in values:
            raise ConfigError(f"{where}: {old} and {new} are one key; give one of them")
    share = str(values.get("warmup_ratio", "")) if "warmup_ratio" in names else ""
    if re.fullmatch(r"[1-9]\d*(\.\d*)?", share.strip()):  # which would be as many steps
        raise ConfigError(
            f"{where}: warmup_ratio is a share of all steps, below 1 (got {shown(share)}); for a number "
            "of steps write warmup_steps"
        )
    for old in names.keys() & RENAMED.keys():
        print(f"{where}: {old} is called {names[old]} now", flush=True)
    return {names.get(key, key): value for key, value in values.items()}


def _without_foreign(kind: type[Config], values: dict[str, Any], where: str) -> dict[str, Any]:
    """`values` without keys of other programs that mean nothing here, which are named in a line.

    Raises:
        ConfigError: a key of another program that would change what is done; the message says what to write.
    """
    foreign = {key for key in values if isinstance(key, str)} - set(kind.model_fields)
    for key in foreign & SWITCHED_OFF.keys():
        if values[key] not in (None, False, 0, "", "none", "main", "concat", []):
            raise ConfigError(f"{where}: {key}: {SWITCHED_OFF[key]}")
    if unused := sorted(foreign & NO_MEANING.keys()):
        print(f"without a meaning here: {', '.join(f'{key} ({NO_MEANING[key]})' for key in unused)}", flush=True)
    dropped = foreign & (NO_MEANING.keys() | SWITCHED_OFF.keys())
    return {key: value for key, value in values.items() if key not in dropped}


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # keys that do not go together; the message names them
        return message
    parts = [str(part) for part in first["loc"]]
    # What follows a key may be the name of a type that was tried, as `bool` or `dict[str,any]`.
    names = [parts[0], *(part for part in parts[1:] if re.fullmatch(r"\d+|[a-z_]+", part) and part not in _TYPES)]
    key = shown_path(".".join(names))
    if first["type"] == "missing":
        return f"{key} must be given"
    if first["type"] in ("string_type", "path_type") and type(first["input"]) in (bool, int, float):
        message = "a text is wanted here; write it in quotes"
    given = without_secrets({parts[0]: first["input"]})[parts[0]]
    if given != first["input"]:
        message = message.replace(str(first["input"]), shown(given))
    return f"{key}: {message} (got {shown(given)})"


_TYPES = {"bool", "int", "float", "str", "none"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlong = 40
_SHORT.maxlevel = 3


def shown(value: Any) -> str:
    """`value` in an error message: short, in one line, secrets left out."""
    return hidden(_SHORT.repr(value))


def shown_path(path: str | Path) -> str:
    """A name or a path in an error message, short enough to be read."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:100]}… ({len(text)} characters)"
