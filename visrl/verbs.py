"""How every verb ends when it is interrupted or its input is bad: one clear sentence and a status that is not 0."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperGroup

# Errors that are the user's to mend: their message is the whole story. By the module that raises them, for what a
# module raises that was never imported cannot have been raised.
USER_ERRORS = {
    "visrl.box": "BoxError",
    "visrl.config": "ConfigError",
    "visrl.conversation": "PromptError",
    "visrl.engines.client": "EndpointError",
    "visrl.failures": "FailedRun",
    "visrl.images": "ImageError",
    "visrl.manifest": "ManifestError",
    "visrl.models.folder": "CheckpointError",
    "visrl.records": "RecordError",
    "visrl.report.files": "ReportError",
    "visrl.train.processes": "ProcessError",
}


class Verbs(TyperGroup):
    """A group of verbs that ends with a sentence where the user can mend what is wrong."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("visrl: interrupted; the same command goes on where this one stopped", err=True)
            raise typer.Exit(130) from None
        except _user_errors() as error:
            typer.echo(f"visrl: {error}", err=True)
            raise typer.Exit(1) from error


def _user_errors() -> tuple[type[BaseException], ...]:
    """The errors of `USER_ERRORS` that can have been raised, and those of the file system."""
    raised = (getattr(sys.modules[module], name) for module, name in USER_ERRORS.items() if module in sys.modules)
    return (OSError, *raised)
