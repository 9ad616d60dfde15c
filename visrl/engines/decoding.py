"""Texts that are drawn side by side, one token of each at every step; others may join between two steps.

How the next token's logits come about is the engine's business: here are the draws, and where a text ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from visrl.conversation import Conversation, PromptError
from visrl.engines.base import Completion, Sampling
from visrl.models.encode import Encoder, TokenPath

ReadText = Callable[[], str]
OnToken = Callable[[int, ReadText], bool]  # told the row and how to read its text so far; False stops the row


@dataclass(frozen=True, slots=True)
class Row:
    """One sample to draw: a conversation, how to draw it, and its seed."""

    conversation: Conversation
    sampling: Sampling
    seed: int


@dataclass(slots=True)
class Text:
    """What has been drawn of a row, after its prompt."""

    row: Row
    prompt: TokenPath
    uniform: np.ndarray | None  # random numbers, one a token, the same whatever else is drawn; None where greedy
    tokens: list[int] = field(default_factory=list)

    @staticmethod
    def of(row: Row, prompt: TokenPath) -> Text:
        """The empty text of a row."""
        sampling = row.sampling
        hot = sampling.temperature > 0
        return Text(row, prompt, np.random.default_rng(row.seed).random(sampling.max_tokens + 1) if hot else None)


class Drawing(ABC):
    """The texts being drawn, by the numbers that the caller gave their rows; its length is how many there are."""

    def __init__(self, encoder: Encoder, on_token: OnToken | None = None) -> None:
        self.encoder = encoder
        self.texts: dict[int, Text] = {}
        self._on_token = on_token

    def __len__(self) -> int:
        return len(self.texts)

    @abstractmethod
    def add(self, rows: Mapping[int, Row]) -> dict[int, Completion]:
        """Let rows join, and draw the first token of each; those that have ended with it, or cannot be drawn at all.

        Raises:
            ValueError, RuntimeError: what the model raises. The drawing is of no more use where its length has changed;
                else none of `rows` has joined, and the others go on.
        """

    @abstractmethod
    def step(self) -> dict[int, Completion]:
        """Draw the next token of every text; those that have ended with it.

        Raises:
            ValueError, RuntimeError: what the model raises; the drawing is of no more use then.
        """

    def read(self, rows: Mapping[int, Row]) -> tuple[dict[int, Text], dict[int, Completion]]:
        """The empty texts of rows, and errors in place of those whose prompts no model may be shown."""
        texts, failed = {}, {}
        known: dict[int, TokenPath] = {}  # of conversations: samples of one share its prompt
        for number, row in rows.items():
            talk = row.conversation
            try:
                if id(talk) not in known:
                    known[id(talk)] = self.encoder.encode(talk, [None], max_tokens=self.encoder.max_tokens)[0]
                texts[number] = Text.of(row, known[id(talk)])
            except PromptError as error:
                failed[number] = Completion(None, finish_reason="error", error=str(error), refused=True)
        return texts, failed

    def take(self, tokens: Mapping[int, int]) -> dict[int, Completion]:
        """Add a token to each of these texts; those that end here leave."""
        ended = {}
        for number, token in tokens.items():
            text = self.texts[number]
            go_on = token != self.encoder.end_id
            if go_on:
                text.tokens.append(token)
                go_on = self._on_token is None or self._on_token(number, partial(self.encoder.decode, text.tokens))
            if not go_on or len(text.tokens) >= text.row.sampling.max_tokens:
                ended[number] = self.complete(self.texts.pop(number), is_cut=go_on)
        return ended

    def complete(self, text: Text, is_cut: bool = False) -> Completion:
        """A text as a whole; `is_cut` says that its row allows no more tokens."""
        return Completion(
            self.encoder.decode(text.tokens),
            len(text.tokens),
            "length" if is_cut else "stop",
            prompt_tokens=len(text.prompt.ids),
        )


def draw_tokens(logits: torch.Tensor, texts: Sequence[Text]) -> list[int]:
    """The next token of each text from its `logits` [texts, vocabulary]: the arg-max, or an inverse-CDF draw from the
    nucleus.
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    hot = [(n, text, text.uniform[len(text.tokens)]) for n, text in enumerate(texts) if text.uniform is not None]
    if not hot:
        return chosen
    device = logits.device
    temperature = torch.tensor([text.row.sampling.temperature for _, text, _ in hot], device=device)
    probabilities = torch.softmax(logits[[n for n, _, _ in hot]] / temperature[:, None], dim=-1).double()
    top_p = torch.tensor([text.row.sampling.top_p for _, text, _ in hot], device=device, dtype=torch.float64)
    if (top_p < 1).any():
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.tensor([number for _, _, number in hot], device=device, dtype=torch.float64)
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    for (n, _, _), token in zip(hot, found.clamp(max=logits.shape[-1] - 1).tolist(), strict=True):
        chosen[n] = token
    return chosen


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """`probabilities` [rows, vocabulary] with everything outside the smallest set of mass ≥ top_p set to 0."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p[:, None]
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))
