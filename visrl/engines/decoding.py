"""Continuous batching: a running batch of sequences that grow by one token per decode step; requests join and leave
between two steps.

Where the next token's logits come from is the engine's: from a KV cache (`CachedBatch`, cached.py), or from a forward
pass over the whole sequence (`RecomputedBatch`, recompute.py). Here a token is sampled, and a sequence ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch

from visrl.conversation import Conversation, PromptError
from visrl.engines.base import Completion, Policy, Request
from visrl.models.adapters import Adapter
from visrl.models.encode import EncodedView, Encoder, TokenPath

ReadText = Callable[[], str]
# Called after every token with the number of its request and a function that decodes the text so far; False stops it.
OnToken = Callable[[int, ReadText], bool]


@dataclass(slots=True)
class RunningSequence:
    """A request that is being decoded: its prompt, and the tokens sampled so far, but for the end of the turn."""

    request: Request
    prompt: TokenPath
    uniform: np.ndarray | None  # random numbers, one per token, the same in any batch; None where greedy
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)  # of the tokens and of the end, where they are asked for

    @staticmethod
    def of(request: Request, prompt: TokenPath) -> RunningSequence:
        """The sequence of a request before its first token."""
        sampling = request.sampling
        hot = sampling.temperature > 0
        uniform = np.random.default_rng(request.seed).random(sampling.max_tokens + 1) if hot else None
        return RunningSequence(request, prompt, uniform)


class DecodeBatch(ABC):
    """The running batch: sequences by the numbers that the caller gave their requests; its length is how many run."""

    def __init__(self, encoder: Encoder, on_token: OnToken | None = None) -> None:
        self.encoder = encoder
        self.sequences: dict[int, RunningSequence] = {}
        self._on_token = on_token

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def last_tokens(self) -> dict[int, int]:
        """The token that was sampled last for each sequence."""
        return {number: sequence.tokens[-1] for number, sequence in self.sequences.items()}

    @abstractmethod
    def add(self, requests: Mapping[int, Request]) -> dict[int, Completion]:
        """Let requests join: prefill their prompts and sample the first token of each. Returns the completions of those
        that ended with it, or that cannot be computed at all.

        Raises:
            ValueError, RuntimeError: what the model raises. The batch is of no more use where its length has changed;
                else none of `requests` has joined, and the others go on.
        """

    @abstractmethod
    def step(self) -> dict[int, Completion]:
        """One decode step: the next token of every sequence. Returns the completions of those that ended with it.

        Raises:
            ValueError, RuntimeError: what the model raises; the batch is of no more use then.
        """

    def start(self, requests: Mapping[int, Request]) -> tuple[dict[int, RunningSequence], dict[int, Completion]]:
        """The sequences of requests, and errors in place of those whose prompts no model may be shown."""
        sequences, failed = {}, {}
        prompts: dict[int, TokenPath] = {}  # of conversations: samples of one share its prompt
        for number, request in requests.items():
            key, limit = id(request.conversation), self.encoder.max_tokens
            try:
                if key not in prompts:
                    prompts[key] = self.encoder.encode(request.conversation, [None], max_tokens=limit)[0]
                sequences[number] = RunningSequence.of(request, prompts[key])
            except PromptError as error:
                failed[number] = Completion(None, finish_reason="error", error=str(error), refused=True)
        return sequences, failed

    def sample(self, numbers: Sequence[int], logits: torch.Tensor) -> dict[int, Completion]:
        """Sample a token for each of these sequences from `logits` [numbers, vocabulary]; those that end with it leave
        the batch."""
        ended = {}
        sequences = [self.sequences[number] for number in numbers]
        # What is written for images is never said: the model would look for an image there. Log-probabilities stay
        # those of all tokens, as training has them (see `Completion.logps`).
        unsaid = [token for token in self.encoder.image_ids if token < logits.shape[-1]]
        sayable = logits.index_fill(-1, torch.tensor(unsaid, dtype=torch.long, device=logits.device), -torch.inf)
        tokens = sample_tokens(sayable, sequences)
        _keep_logps(logits, sequences, tokens)
        for number, sequence, token in zip(numbers, sequences, tokens, strict=True):
            go_on = has_more = token != self.encoder.end_id
            if has_more:
                sequence.tokens.append(token)
                go_on = self._on_token is None or self._on_token(number, partial(self.encoder.decode, sequence.tokens))
            if not go_on or len(sequence.tokens) >= sequence.request.sampling.max_tokens:
                ended[number] = self.complete(self.sequences.pop(number), is_cut=go_on, has_end=not has_more)
        return ended

    def complete(self, sequence: RunningSequence, is_cut: bool = False, has_end: bool = False) -> Completion:
        """The completion of a sequence that has ended: by the end of its turn (`has_end`), because its request allows
        no more tokens (`is_cut`), or because its reader wants none."""
        return Completion(
            self.encoder.decode(sequence.tokens),
            len(sequence.tokens),
            "length" if is_cut else "stop",
            prompt_tokens=len(sequence.prompt.ids),
            ids=(*sequence.tokens, *([self.encoder.end_id] if has_end else ())),
            logps=tuple(sequence.logps),
            prompt_ids=tuple(sequence.prompt.ids.tolist()) if sequence.request.sampling.prompt_ids else (),
        )


class DecodingEngine(Policy, Protocol):
    """A policy that decodes step by step, for a scheduler above it (serve/decode_loop.py)."""

    def begin(self, on_token: OnToken | None = None) -> DecodeBatch:
        """An empty running batch; one of an engine is in use at a time."""
        ...

    def prepare(self, conversation: Conversation) -> Sequence[EncodedView]:
        """The images of a conversation, ready for the vision tower; may run in another thread than the decoding."""
        ...

    def keep(self, prepared: Iterable[EncodedView]) -> None:
        """Have what `prepare` gave at hand for the next `DecodeBatch.add`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some tokens."""
        ...

    def check_adapter(self, adapter: Adapter) -> None:
        """Make sure that an adapter has its place on the model; may run in another thread than the decoding.

        Raises:
            CheckpointError: it has not.
        """
        ...

    def use_adapter(self, adapter: Adapter | None) -> None:
        """Have the model compute with an adapter on it, or as it is; between two batches."""
        ...


def sample_tokens(logits: torch.Tensor, sequences: Sequence[RunningSequence]) -> list[int]:
    """The next token of each sequence from its `logits` [sequences, vocabulary]: the arg-max where greedy, else by
    inverse CDF of the softmax at its temperature, cut to the top-p nucleus.
    """
    chosen: list[int] = logits.argmax(-1).tolist()
    hot = [(n, one, one.uniform[len(one.tokens)]) for n, one in enumerate(sequences) if one.uniform is not None]
    if not hot:
        return chosen
    device = logits.device
    temperature = torch.tensor([one.request.sampling.temperature for _, one, _ in hot], device=device)
    probabilities = torch.softmax(logits[[n for n, _, _ in hot]] / temperature[:, None], dim=-1).double()
    top_p = torch.tensor([one.request.sampling.top_p for _, one, _ in hot], device=device, dtype=torch.float64)
    if (top_p < 1).any():
        probabilities = _nucleus(probabilities, top_p)
    cumulative = probabilities.cumsum(-1)
    uniform = torch.tensor([number for _, _, number in hot], device=device, dtype=torch.float64)
    found = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]
    for (n, _, _), token in zip(hot, found.clamp(max=logits.shape[-1] - 1).tolist(), strict=True):
        chosen[n] = token
    return chosen


def _keep_logps(logits: torch.Tensor, sequences: Sequence[RunningSequence], tokens: Sequence[int]) -> None:
    """Add the log-probabilities of `tokens` to the sequences whose requests ask for them (see `Completion.logps`)."""
    asking = [n for n, sequence in enumerate(sequences) if sequence.request.sampling.logprobs]
    if not asking:
        return
    heat = [sequences[n].request.sampling.temperature or 1.0 for n in asking]
    logps = (logits[asking].float() / logits.new_tensor(heat)[:, None]).log_softmax(-1)
    sampled = torch.tensor([[tokens[n]] for n in asking], device=logits.device)
    for n, logp in zip(asking, logps.gather(-1, sampled)[:, 0].tolist(), strict=True):
        sequences[n].logps.append(logp)


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """`probabilities` [sequences, vocabulary] with everything outside the smallest set of mass ≥ top_p set to 0."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p[:, None]
    return torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(outside, 0.0))
