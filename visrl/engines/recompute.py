"""Decoding without a KV cache, for families whose tokens see more than what came before them: every decode step is a
forward pass over the whole sequences.

Slow, and exact by the same packed sequences that train: nothing here knows a family. Samples of one prompt share it
within a step. Models of these families that are to be fast are served by vLLM or SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from visrl.conversation import View, focus_conversation
from visrl.engines.base import Completion, Request
from visrl.engines.decoding import DecodeBatch, OnToken, RunningSequence
from visrl.models.attention import attending
from visrl.models.encode import Encoder, TokenPath
from visrl.models.folder import CheckpointError
from visrl.models.load import reading
from visrl.models.modes import evaluating
from visrl.models.parts import base_model
from visrl.packing.forward import kept_logits
from visrl.packing.lay_out import lay_out
from visrl.packing.pack import TIGHT_BUCKET

NEAR, NEAR_HALF = 1e-4, 0.05  # logits of one token among different rows, in fp32 and in halves: shares of the largest


class RecomputedBatch(DecodeBatch):
    """A running batch of which no keys and values are kept."""

    def __init__(self, model: torch.nn.Module, encoder: Encoder, on_token: OnToken | None = None) -> None:
        super().__init__(encoder, on_token)
        self.model = model

    @torch.inference_mode()
    def add(self, requests: Mapping[int, Request]) -> dict[int, Completion]:
        sequences, failed = self.start(requests)
        if not sequences:
            return failed
        logits = self._next_logits(sequences)
        self.sequences |= sequences
        return failed | self.sample(list(sequences), logits)

    @torch.inference_mode()
    def step(self) -> dict[int, Completion]:
        return self.sample(list(self.sequences), self._next_logits(self.sequences)) if self.sequences else {}

    def _next_logits(self, sequences: Mapping[int, RunningSequence]) -> torch.Tensor:
        return next_logits(self.model, self.encoder, [self._path(one) for one in sequences.values()])

    def _path(self, sequence: RunningSequence) -> TokenPath:
        """The prompt with the tokens sampled so far, and one more for what follows."""
        return self.encoder.continued(sequence.prompt, [*sequence.tokens, self.encoder.end_id])


def try_out(model: torch.nn.Module, encoder: Encoder, name: str | Path) -> None:
    """Compute one token about a small image: a model that cannot is refused before any work begins.

    Raises:
        CheckpointError: the computation fails, or gives no numbers.
    """
    asked = focus_conversation("?", View("first token", Image.new("RGB", (64, 64))))
    with reading(name, "the model fails at its first token"), evaluating(model), torch.no_grad():
        logits = next_logits(model, encoder, encoder.encode(asked, ["1"]))
        if encoder.family.plain:
            _check_plain(model, encoder, encoder.encode(asked, ["1", "1 2 3 4"]))
    encoder.forget()
    if logits.isnan().any():
        raise CheckpointError(f"{name}: the model's first token comes of no numbers (NaN)")


def _check_plain(model: torch.nn.Module, encoder: Encoder, paths: Sequence[TokenPath]) -> None:
    """Refuse a model that the plain form cannot be right for, by two responses to one prompt.

    Raises:
        CheckpointError: it does not generate by itself, or what it makes of a token hangs on those that follow.
    """
    if not base_model(model).can_generate():
        raise CheckpointError("it has no `generate` of its own, by which the plain form samples")
    packed = lay_out([paths], encoder)[0].to(next(model.parameters()).device)
    logits = kept_logits(model, packed).float()
    one, other = (logits[packed.row[packed.branch == branch][0]] for branch in (0, 1))
    near = NEAR if next(model.parameters()).dtype == torch.float32 else NEAR_HALF
    if (one - other).abs().max() > near * one.abs().max():
        raise CheckpointError(
            "it has no plain form: what it makes of a token hangs on those that follow, or on padding; leave out "
            "layout: plain, or take another model"
        )


def next_logits(model: torch.nn.Module, encoder: Encoder, paths: Sequence[TokenPath]) -> torch.Tensor:
    """Logits [paths, vocabulary], in fp32, of what follows each path; its last token stands for what follows."""
    packed, order = lay_out([[path] for path in paths], encoder, bucket=TIGHT_BUCKET)
    packed = packed.to(next(model.parameters()).device)
    last = torch.empty(len(paths), dtype=torch.long, device=packed.row.device)
    # Of the responses' rows in order, a later one of a branch takes an earlier one's place.
    for row, branch in zip(packed.row, packed.branch.tolist(), strict=True):
        last[order[branch]] = row
    with attending(model, encoder.family):
        return kept_logits(model, packed)[last].float()
