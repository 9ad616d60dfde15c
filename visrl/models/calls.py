"""What a model's own forward takes: which arguments, features in the place of images, the name of its cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers.utils import ModelOutput

from visrl.models.family import ImageInputs
from visrl.models.parts import base_model

# What the vision tower made of images, in the output class of the model's own `get_image_features`.
Features = ModelOutput
# The fields of it that the language model reads, whatever else the tower says of itself.
READ_FIELDS = ("pooler_output", "deepstack_features")
FEATURES_ARGUMENT = "mm_encoder_outputs"  # of a forward that takes features in the place of images


def takes_features(model: torch.nn.Module) -> bool:
    """Whether the model's forward names an argument for features in the place of images, the inner one's too: what
    it does not name may be swallowed unread."""
    base = base_model(model)
    return all(FEATURES_ARGUMENT in inspect.signature(part.forward).parameters for part in (base, base.model))


def image_features(model: torch.nn.Module, image: ImageInputs) -> Features:
    """The features of one image, without what the language model does not read."""
    made = base_model(model).model.get_image_features(**image, return_dict=True)
    return type(made)(**{name: made[name] for name in READ_FIELDS if name in made})


def features_input(features: Sequence[Features]) -> dict[str, Any]:
    """The model's input in the place of its images: the features of several as one, in their order."""
    fields: dict[str, Any] = {"pooler_output": _joined([one["pooler_output"] for one in features])}
    if "deepstack_features" in features[0]:  # one entry per layer
        layers = zip(*(one["deepstack_features"] for one in features), strict=True)
        fields["deepstack_features"] = [_joined(layer) for layer in layers]
    return {FEATURES_ARGUMENT: {"image": type(features[0])(**fields)}}


def _joined(values: Sequence[Any]) -> Any:
    """Tensors along their first axis, lists one after another."""
    return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else [part for one in values for part in one]


def forward_arguments(model: Any) -> frozenset[str]:
    """The arguments that a model's forward names, through whatever is wrapped around the model; `model` may be its
    class. What a forward does not name it may swallow unread."""
    kind: Any = model if isinstance(model, type) else type(base_model(extract_model_from_parallel(model)))
    return frozenset(inspect.signature(kind.forward).parameters)


def cache_argument(model: torch.nn.Module) -> str:
    """What the model's forward calls the keys and values it is given: `cache`, or the older `past_key_values`."""
    return "cache" if "cache" in inspect.signature(base_model(model).forward).parameters else "past_key_values"
