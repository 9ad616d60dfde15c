"""How a checkpoint looks at images: kept beside its weights, so that it trains, generates and serves the same way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from visrl.box import CropRule
from visrl.codecs import CODECS
from visrl.config import ConfigError
from visrl.models.folder import CheckpointError, read_object

NAME = "visrl.json"
LIMITS = ("image_min_pixels", "image_max_pixels", "crop_min_pixels", "crop_max_pixels")
# More pixels than any image has, and than any image can be enlarged to; larger numbers are slips.
MOST_PIXELS, LARGEST_MINIMUM = 10**9, 10**8


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Pixel limits of the whole image and of crops (None: the processor's own), the crop rule and the box codec.

    Raises:
        ConfigError: no such crop rule or codec, or a limit that is no number of pixels.
    """

    image_min_pixels: int | None = None
    image_max_pixels: int | None = None
    crop_min_pixels: int | None = None
    crop_max_pixels: int | None = None
    crop_rule: CropRule = "exact"
    codec: str = "visrl"

    def __post_init__(self) -> None:
        for key, value, known in (("crop_rule", self.crop_rule, get_args(CropRule)), ("codec", self.codec, CODECS)):
            if not isinstance(value, str) or value not in known:
                raise ConfigError(f"a checkpoint's {key} must be one of {', '.join(known)}, not {value!r}")
        for key in LIMITS:
            value = getattr(self, key)
            most = MOST_PIXELS if key.endswith("max_pixels") else LARGEST_MINIMUM
            if value is not None and not (type(value) is int and 1 <= value <= most):
                raise ConfigError(f"a checkpoint's {key} must be a number of pixels up to {most:,}, not {value!r}")

    def save(self, folder: str | Path) -> None:
        """Write these settings into a checkpoint's folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path, adapter: str | Path | None = None) -> ModelSettings:
        """The settings in a checkpoint's folder, or the defaults where it has none (a model from elsewhere). Those of
        an adapter trained on it come first.

        Raises:
            ConfigError: a file that is damaged, or says what this release does not know.
        """
        path = Path(folder, NAME)
        if adapter is not None and Path(adapter, NAME).is_file():
            path = Path(adapter, NAME)
        if not path.is_file():
            return ModelSettings()
        try:
            values = read_object(path)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        known = {field.name for field in fields(ModelSettings)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"{path} holds keys that are not known here: {', '.join(unknown)}")
        try:
            return ModelSettings(**values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def other_rule(self, rule: CropRule) -> str | None:
        """What to say before work under `rule` where this checkpoint crops by another one, else None."""
        if rule == self.crop_rule:
            return None
        return f"crops are cut by the rule {rule!r}; the checkpoint was made for {self.crop_rule!r}"

    def with_given(self, **given: Any) -> ModelSettings:
        """These settings with every value that is given (not None) in place of its own."""
        return replace(self, **{key: value for key, value in given.items() if value is not None})
