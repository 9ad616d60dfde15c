"""What is learned from online: a text that a policy sampled, with the prompt that it was sampled after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from visrl.engines.base import Completion
from visrl.models.encode import TokenPath
from visrl.records import Step
from visrl.train.checkpoints import TrainingError


@dataclass(frozen=True, slots=True)
class Response:
    """A sampled text and the advantage that it has, None where its reward could not be told. Its step is "box" where it
    looks, or tries to, and "answer" where it answers."""

    row: str
    step: Step
    completion: Completion
    prompt: TokenPath
    advantage: float | None


def check_prompt(name: str, prompt: TokenPath, completions: Sequence[Completion | None]) -> None:
    """Refuse what was sampled from a prompt of another length than is learned from: a server that sizes images, or
    writes prompts, in its own way.

    Raises:
        TrainingError: so it is.
    """
    for one in completions:
        if one is not None and one.prompt_tokens not in (0, len(prompt.ids)):
            raise TrainingError(
                f"row {name}: the server showed {one.prompt_tokens} tokens where the prompt has {len(prompt.ids)}; "
                "serve the same checkpoint with its chat template and picture sizes, and let no limit of the server's "
                "own come between"
            )
