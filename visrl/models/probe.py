"""A proof at loading: whether the models of a checkpoint take a packed prefix tree, found on a small random copy.

What they may take comes from processor, signature and config (derive.py). Each of it is held against the model's own
calls on its own processor's inputs, one sequence at a time (proof.py). What is found is kept in a cache (proofs.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from visrl.models.asked import SAID, clues_of, native, talks
from visrl.models.derive import Clues, candidates, end_of_turn, found_family
from visrl.models.families import family_of, plain_family
from visrl.models.family import Family
from visrl.models.found import Found
from visrl.models.parts import switch_off_dropout
from visrl.models.proof import SAME_LOGPS, NoProof, Proof, foreign
from visrl.models.proofs import keep, kept, key_of
from visrl.models.settings import ModelSettings
from visrl.models.small import renumbered, small_copy
from visrl.models.tree_encoder import TreeEncoder

LOUD = 0.07  # of the noise on the copy's weights, so that every token matters

# A small copy of a config, with its tokens renumbered where numbers are given.
Build = Callable[[Any, torch.Tensor | None], torch.nn.Module]


def find_family(processor: Any, config: Any) -> Family:
    """The family of a processor and a config: as its entry says it, else as a trial finds it. `Family.plain` says why
    its models take no prefix tree, where they take none: such a model trains and decodes in the plain form."""
    family = family_of(config)
    if not family.plain:
        return family
    if not type(config).__module__.startswith("transformers."):
        return plain_family(config.model_type, "its code came with the checkpoint")
    found = proved(processor, config)
    if isinstance(found, Found):
        return found_family(found, config)
    try:
        with foreign("no end of a turn"):
            end = end_of_turn(processor, processor.chat_template)
    except NoProof:  # a template that is no good is told when prompts are tried
        end = None
    return replace(plain_family(config.model_type, found), end_of_turn=end)


def proved(processor: Any, config: Any) -> Found | str:
    """What `prove` finds, or why it finds nothing: out of the cache, where the same was tried before."""
    key = key_of(processor, config)
    known = kept(key)
    if known is None:
        try:
            known = prove(processor, config)
        except NoProof as error:
            known = str(error)
        keep(key, known)
    return known


def prove(processor: Any, config: Any, build: Build = small_copy) -> Found:
    """What the models of a config take, held against their own calls on the copy that `build` makes.

    Raises:
        NoProof: nothing of what they may take gives what their own calls give.
    """
    started = time.process_time()
    with foreign("its processor does not show images one by one"):
        encoder = TreeEncoder(processor, config, ModelSettings())
        ends = end_of_turn(processor, str(encoder.chat_template))
        encoder.end_of_turn = ends or encoder.end_of_turn
        clues = clues_of(encoder)
    with foreign("its own calls cannot be made"):
        calls = [
            native(encoder, talk, response + encoder.end_of_turn)
            for talk, said in zip(talks(), SAID, strict=True)
            for response in said
        ]
        numbers = renumbered(config, (one for call in calls for one in call["input_ids"].flatten().tolist()))
    try:
        return _found(encoder, clues, calls, ends, build, numbers, started)
    except NoProof:
        if numbers is None:
            raise
        return _found(encoder, clues, calls, ends, build, None, started)  # some forwards know tokens by number


def _found(
    encoder: TreeEncoder,
    clues: Clues,
    calls: Sequence[Mapping[str, torch.Tensor]],
    ends: str | None,
    build: Build,
    numbers: torch.Tensor | None,
    started: float,
) -> Found:
    """See `prove`; `calls` are what its processor makes of the trial's prompts and responses."""
    with foreign("no small copy of its model can be made"), _apart():
        model: Any = build(encoder.config, numbers).eval()
        for weight in model.parameters():
            weight.data.add_(torch.randn_like(weight) * LOUD)
    switch_off_dropout(model)
    with foreign("its inputs are not understood"):
        tried = candidates(clues, model, encoder.processor)
    if isinstance(tried, str):
        raise NoProof(tried)
    with foreign("its own calls cannot be made"):
        proof = Proof(model, encoder, calls, numbers, replace(next(tried), end_of_turn=ends))
    faults: list[str] = []
    missed: list[str] = []
    errors: list[float] = []
    for found in proof.ways(tried):
        try:
            with foreign("its forward refuses a packed row"):
                errors.append(proof.error_of(found))
        except NoProof as refusal:
            faults.append(str(refusal))
            continue
        if errors[-1] < SAME_LOGPS:
            try:
                return proof.hold(found, errors[-1], started)
            except NoProof as refusal:
                missed.append(str(refusal))
    if missed or not errors:
        raise NoProof((missed or faults)[0])
    raise NoProof(f"no mask gives what its own calls give (the nearest is {min(errors):.0e} off)")


@contextmanager
def _apart() -> Iterator[None]:
    """Random numbers of the trial's own within."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
