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
from visrl.models.candidates import Clues, by_hand, candidates, end_of_turn, unknown_kinds
from visrl.models.derive import found_family
from visrl.models.encode import chat_template_of
from visrl.models.families import FAMILIES, family_of
from visrl.models.family import Family
from visrl.models.found import Found, NotFound
from visrl.models.parts import switch_off_dropout
from visrl.models.proof import SAME_LOGPS, Contradicted, NoProof, Proof, foreign
from visrl.models.proofs import keep, kept, key_of
from visrl.models.settings import ModelSettings
from visrl.models.small import renumbered, small_copy
from visrl.models.tree_encoder import TreeEncoder

LOUD = 0.07  # of the noise on the copy's weights, so that every token matters

# A small copy of a config, with its tokens renumbered where numbers are given.
Build = Callable[[Any, torch.Tensor | None], torch.nn.Module]


def find_family(processor: Any, config: Any) -> Family:
    """The family of a processor and a config, as a trial finds it. An entry that no trial can try is taken at its word
    (`Family.untried` says why), unless the model's own calls speak against it. `Family.plain` says why models take no
    prefix tree, where they take none: such a model trains and decodes in the plain form."""
    entry = family_of(config)
    if not type(config).__module__.startswith("transformers."):
        return _ending(processor, replace(entry, plain="its code came with the checkpoint"))
    found = proved(processor, config)
    if isinstance(found, Found):
        return found_family(found, config)
    if not entry.plain and not found.contradicted:
        return replace(entry, untried=found.reason)
    return _ending(processor, replace(entry, plain=found.reason))


def _ending(processor: Any, family: Family) -> Family:
    """A plain family whose turns end as its entry says, else as its chat template ends them."""
    if family.end_of_turn is not None:
        return family
    try:
        with foreign("no end of a turn"):
            return replace(family, end_of_turn=end_of_turn(processor, str(chat_template_of(processor))))
    except NoProof:  # a template that is no good is told when prompts are tried
        return family


def proved(processor: Any, config: Any) -> Found | NotFound:
    """What `prove` finds, or why it finds nothing: out of the cache, where the same was tried before."""
    key = key_of(processor, config)
    known = kept(key)
    if known is None:
        try:
            known = prove(processor, config)
        except NoProof as error:
            known = NotFound(str(error), error.contradicted)
        keep(key, known)
    return known


def prove(processor: Any, config: Any, build: Build = small_copy) -> Found:
    """What the models of a config take, held against their own calls on the copy that `build` makes.

    Raises:
        NoProof: nothing of what they may take gives what their own calls give.
    """
    started = time.process_time()
    if others := unknown_kinds(config):
        raise NoProof(f"it has layers of a kind whose masks are not known ({', '.join(others)})")
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
    entry, refusals = FAMILIES.get(encoder.config.model_type), []
    for by_entry in (False, True) if entry else (False,):
        try:
            with foreign("its inputs are not understood"):
                tried = iter([by_hand(entry)]) if entry and by_entry else candidates(clues, model, encoder.processor)
            if isinstance(tried, str):
                raise NoProof(tried)
            with foreign("its own calls cannot be made"):
                proof = Proof(model, encoder, calls, numbers, replace(next(tried), end_of_turn=ends))
            return _held(proof, tried, started)
        except NoProof as refusal:
            refusals.append(refusal)
    raise next((one for one in refusals if one.contradicted), refusals[0])


def _held(proof: Proof, tried: Iterator[Found], started: float) -> Found:
    """The first way that the model's own calls bear out; see `prove`."""
    faults: list[NoProof] = []
    missed: list[NoProof] = []
    errors: list[float] = []
    for found in proof.ways(tried):
        try:
            with foreign("its forward refuses a packed row"):
                sums, error = proof.packed(found)
        except NoProof as refusal:
            faults.append(refusal)
            continue
        errors.append(error)
        if error < SAME_LOGPS:
            try:
                return proof.hold(found, sums, error, started)
            except NoProof as refusal:
                missed.append(refusal)
    if missed or not errors:
        raise (missed or faults)[0]
    raise Contradicted(f"no mask gives what its own calls give (the nearest is {min(errors):.0e} off)")


@contextmanager
def _apart() -> Iterator[None]:
    """Random numbers of the trial's own within."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
