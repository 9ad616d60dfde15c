"""The parts of a model: text decoder, vision tower, projector, recurrent layers, through any adapter around it."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from visrl.models.families import FAMILIES, RECURRENT_KINDS
from visrl.models.folder import CheckpointError


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The text decoder inside a vision-language model, through any adapter wrapped around it."""
    return _part(model, 0)


def vision_tower(model: torch.nn.Module) -> torch.nn.Module:
    """The vision tower (with its projector where that is part of it)."""
    return _part(model, 1)


def projector(model: torch.nn.Module) -> torch.nn.Module:
    """What maps the tower's features to the language model's."""
    return _part(model, 2)


def base_model(model: Any) -> Any:
    """The vision-language model itself, out of any adapter wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def older_names(model: Any) -> list[tuple[str, str]]:
    """Beginnings of layers' names before the decoder moved under `model.language_model`, and what they are now."""
    decoder, tower, bridge = _parts(model)
    inner = ("layers.", "embed_tokens", "norm")
    moves = [(f"model.{part}", f"model.{decoder}.{part}") for part in inner]
    moves += [(f"language_model.model.{part}", f"model.{decoder}.{part}") for part in inner]
    moves += [(f"language_model.{part}", f"model.{decoder}.{part}") for part in inner]
    moves += [("language_model.lm_head", "lm_head")]
    return moves + [(f"{part}.", f"model.{part}.") for part in (tower, bridge)]


def vision_names() -> list[str]:
    """The names that any family gives its vision tower or its projector."""
    return sorted({name for family in FAMILIES.values() for part in family.parts[1:] for name in part.split(".")})


def trains_features(model: torch.nn.Module) -> bool:
    """Whether any weight that image features depend on is trained."""
    base = base_model(model)
    decoder = _parts(base)[0]
    seeing = (weights for name, weights in _inner(base).named_parameters() if not name.startswith(f"{decoder}."))
    return any(weights.requires_grad for weights in seeing)


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Have the model compute the same thing every time, in training, too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _part(model: Any, which: int) -> torch.nn.Module:
    base = base_model(model)
    return _inner(base).get_submodule(_parts(base)[which])


def _inner(base: Any) -> torch.nn.Module:
    """What holds decoder, vision tower and projector: `model`, or the whole where a class has no such part."""
    inner = getattr(base, "model", None)
    decoder = base.get_decoder()
    return (
        inner if inner is not None and any(part is decoder for part in inner.modules() if part is not inner) else base
    )


def _parts(base: Any) -> tuple[str, str, str]:
    """The names of decoder, vision tower and projector in `_inner`: of the entry, else as the model's own
    `get_decoder` and `get_encoder` find them; the projector is what else has weights.

    Raises:
        CheckpointError: a model in which they are not apart.
    """
    if base.config.model_type in FAMILIES:
        return FAMILIES[base.config.model_type].parts
    inner = _inner(base)
    names = {module: name for name, module in inner.named_modules()}
    decoder, tower = (names.get(part) for part in (base.get_decoder(), base.get_encoder(modality="image")))
    if not decoder:
        raise CheckpointError(f"the decoder of a {type(base).__name__} is not told apart from the rest")
    output = base.get_output_embeddings()
    others = [
        name for name, part in inner.named_children()
        if part is not output and any(True for _ in part.parameters())
        and not any(known == name or known.startswith(f"{name}.") for known in (decoder, tower) if known)
    ]  # fmt: skip
    if not tower and not others:
        raise CheckpointError(f"a {type(base).__name__} has no weights that see images, beside its decoder")
    return decoder, tower or others[0], others[0] if others else str(tower)


def recurrent_layers(model: torch.nn.Module) -> list[Any]:
    """What hands on a state in the decoder's layers: linear attention, short convolutions."""
    decoder: Any = language_model(model)
    kinds = getattr(decoder.config, "layer_types", None) or ()
    layers = [layer for layer, kind in zip(decoder.layers, kinds, strict=False) if kind in RECURRENT_KINDS]
    return [next(part for part in layer.children() if "layer_idx" in vars(part)) for layer in layers]


def state_argument(layer: torch.nn.Module) -> str:
    """What the forward of a recurrent layer calls the cache of its states: `cache`, or an older name."""
    names = inspect.signature(layer.forward).parameters
    return next(name for name in ("cache", "cache_params", "past_key_values") if name in names)
