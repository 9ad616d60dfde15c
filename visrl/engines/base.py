"""What every engine is: conversations in, sampled completions out. Knows no model and no box text.

Three protocols, each with what the one before it has:

- `Engine` completes conversations: all that a critic or a judge needs.
- `Policy` is an engine whose box text can be read: what rollouts, evaluation and training ask. `endpoint.py` (any
  OpenAI-compatible server) and `local.py` (a checkpoint in this process) are both.
- `DecodingEngine` (decoding.py) decodes step by step, so that requests join and leave a running batch: what the server
  schedules. `local.py` alone is one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from visrl.box import Size
from visrl.codecs import Codec
from visrl.conversation import Conversation
from visrl.replies import whole_text


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are sampled. Temperature 0 is greedy. `logprobs` asks for the log-probability of every sampled token
    (`Completion.logps`), `prompt_ids` for the tokens of the prompt (`Completion.prompt_ids`)."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 128
    logprobs: bool = False
    prompt_ids: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One sample asked of an engine: a conversation, how to sample its reply, and the seed of that."""

    conversation: Conversation
    sampling: Sampling
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled text, or the error that took its place. Half characters, which a server may send, are mended: what
    is said here is shown to models, sent on and written.

    `ids` are the tokens as they were sampled, the end of the turn among them where it was; none from an engine that
    does not tell. `logps` are their log-probabilities, in nats, where `Sampling.logprobs` asks for them: at the
    temperature that they were sampled at (1 where greedy), before the nucleus was cut out and before the tokens that
    stand for images, which are never sampled. `prompt_ids` are the tokens that the model was shown, those of images
    among them, where they are asked for and the engine tells.
    """

    text: str | None
    tokens: int = 0
    finish_reason: Literal["stop", "length", "error"] = "stop"
    error: str | None = None
    prompt_tokens: int = 0
    refused: bool = False  # the model cannot be shown this prompt: asking again would end alike
    ids: tuple[int, ...] = field(default=(), repr=False)
    logps: tuple[float, ...] = field(default=(), repr=False)
    prompt_ids: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, said in (("text", self.text), ("error", self.error)):
            if said is not None and (mended := whole_text(said)) != said:
                object.__setattr__(self, name, mended)


class Engine(Protocol):
    """Conversations in, sampled texts out."""

    name: str

    def complete(
        self, conversations: Sequence[Conversation], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> list[list[Completion]]:
        """One completion per seed: `seeds[i]` holds those of conversation i. A failure is a record, no exception."""
        ...


class Policy(Engine, Protocol):
    """An engine whose box text can be read: it knows its codec and the size its processor gives an image."""

    @property
    def codec(self) -> Codec: ...

    def processed_size(self, size: Size, is_crop: bool = False) -> Size: ...

    def forget(self) -> None:
        """Drop what was kept of earlier conversations: the prefix cache, where there is one."""
        ...


def seed_of(run_seed: int, *parts: object) -> int:
    """A seed in [0, 2^63) of one sample, from the run's seed and what names it (sample id, round, branch, step)."""
    text = "\x1f".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
