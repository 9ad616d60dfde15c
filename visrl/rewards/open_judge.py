"""Which model judges answers: the one that a config names, in this process or behind servers.

The config imports no torch; what asks the judge is imported when it is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from visrl.engines.open import (
    PatienceConfig,
    RequestConfig,
    ServerUrls,
    endpoint_of,
    open_beside,
    refuse_unused,
)
from visrl.prompts import JUDGE_TOKENS

if TYPE_CHECKING:
    from visrl.rewards.judge import AskAll


class JudgeKeys(PatienceConfig):
    """The keys that say which model judges answers."""

    judge_model_name_or_path: str | None = None
    """A judge's name at `judge_url`, or a checkpoint to judge in this process; without it there is no judge."""
    judge_url: ServerUrls = ()
    judge_request: RequestConfig = Field(default_factory=RequestConfig)
    """How requests to the judge's servers are put: `{max_tokens_key: …, extra_body: …}`, as for the policy."""
    judge_max_tokens: int = Field(JUDGE_TOKENS, ge=1)
    """The most that a judge may write; raise it for one that thinks aloud first."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.judge_url and not self.judge_model_name_or_path:
            raise ValueError("judge_url needs judge_model_name_or_path, the judge's name there")
        if not self.judge_url:
            refuse_unused(self.judge_request, "judge_request: ", "judge_url")
        return self


@contextmanager
def opened_judge(
    name: str, urls: Sequence[str], request: RequestConfig, device: str | None = None, **patience: Any
) -> Iterator[AskAll]:
    """What asks the judge `name`: a model behind servers that answer, or one in this process.

    Raises:
        CheckpointError: a model in this process that cannot be loaded.
        EndpointError: a server that does not answer or serves another model.
    """
    from visrl.rewards.judge import client_asker, engine_asker

    if not urls:
        yield engine_asker(open_beside(name, device=device))
        return
    from visrl.engines.client import Client

    with closing(Client(endpoint_of(urls, name, request, **patience))) as client:
        yield client_asker(client)
