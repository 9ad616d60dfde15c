"""Decoding in the plain form: the model's own `generate`, with its own cache, over rows of the checkpoint's own
processor; for models that take no prefix tree.

A token is sampled as in every other batch (decoding.py): the same seeds, the same texts. Rows join by batch: those that
are there when a step begins are decoded to their ends in it, and those that come meanwhile wait for the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from visrl.engines.base import Completion, Request
from visrl.engines.decoding import DecodeBatch, OnToken
from visrl.models.parts import base_model
from visrl.models.plain_encoder import PlainEncoder
from visrl.packing.pack import moved
from visrl.sequences import batched

ROWS = 64  # of one call: each has a prompt of its own in memory


class PlainModel:
    """A model that decodes by its own `generate`."""

    def __init__(self, model: torch.nn.Module, encoder: PlainEncoder) -> None:
        self.model, self.encoder = model, encoder
        self.prefilled_tokens = 0  # counted for benchmarks

    def generate(self, inputs: Mapping[str, Any], tokens: int, sampler: _Sampler) -> None:
        """Decode rows, at most so many tokens each, as `sampler` chooses and ends them."""
        base = base_model(self.model)
        device = next(base.parameters()).device
        with torch.no_grad(), _own_config(base):
            base.generate(
                **moved(dict(inputs), device),
                generation_config=GenerationConfig(
                    max_new_tokens=tokens, do_sample=False, pad_token_id=self.encoder.tokenizer.pad_token_id
                ),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_Ended(sampler)]),
            )


@contextmanager
def _own_config(model: Any) -> Iterator[None]:
    """Nothing of a checkpoint's own ways to sample (a penalty, forced tokens) within, as in no other engine here."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class PlainBatch(DecodeBatch):
    """A running batch whose every step decodes to the end what has joined."""

    def __init__(self, model: PlainModel, on_token: OnToken | None = None) -> None:
        super().__init__(model.encoder, on_token)
        self._model = model

    def add(self, requests: Mapping[int, Request]) -> dict[int, Completion]:
        """Let requests join: their first token is sampled in the next step."""
        sequences, failed = self.start(requests)
        self.sequences |= sequences
        return failed

    def step(self) -> dict[int, Completion]:
        """Decode every sequence to its end."""
        by_images: dict[int, list[int]] = {}
        for number, sequence in self.sequences.items():
            by_images.setdefault(len(sequence.prompt.views), []).append(number)
        ended: dict[int, Completion] = {}
        for own in by_images.values():
            for members in batched(own, ROWS):
                ended |= self._decode(members)
        return ended

    def _decode(self, numbers: Sequence[int]) -> dict[int, Completion]:
        sequences = [self.sequences[number] for number in numbers]
        prompts = [sequence.prompt for sequence in sequences]
        self._model.prefilled_tokens += sum(len(prompt.ids) for prompt in prompts)
        sampler = _Sampler(self, numbers)
        tokens = max(sequence.request.sampling.max_tokens for sequence in sequences)
        self._model.generate(self._model.encoder.prompts(prompts), tokens + 1, sampler)
        return sampler.completions


class _Sampler(LogitsProcessor):
    """Samples the next token of every row that still runs, and leaves `generate` no other to choose."""

    def __init__(self, batch: PlainBatch, numbers: Sequence[int]) -> None:
        self.batch = batch
        self.numbers = numbers  # of the requests, row by row
        self.completions: dict[int, Completion] = {}

    def running(self) -> list[int]:
        """The rows whose sequences have not ended."""
        return [row for row, number in enumerate(self.numbers) if number in self.batch.sequences]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = self.running()
        tokens = torch.full(scores.shape[:1], self.batch.encoder.tokenizer.pad_token_id, device=scores.device)
        if rows:
            numbers = [self.numbers[row] for row in rows]
            self.completions |= self.batch.sample(numbers, scores[rows])
            for row in self.running():
                tokens[row] = self.batch.sequences[self.numbers[row]].tokens[-1]
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Which rows have ended."""

    def __init__(self, sampler: _Sampler) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ended = torch.ones(len(self.sampler.numbers), dtype=torch.bool, device=input_ids.device)
        ended[self.sampler.running()] = False
        return ended
