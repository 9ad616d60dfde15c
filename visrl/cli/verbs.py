"""How every verb ends when it is interrupted or its input is bad: one clear sentence and a status that is not 0."""

from __future__ import annotations

import json
import select
import sys
import warnings
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from visrl.errors import UserError

# How requests to a server are put, for verbs of the command line that take no config (see `RequestConfig`).
MaxTokensKey = Annotated[
    str | None, typer.Option(help="What the limit of tokens is called: max_tokens, or max_completion_tokens.")
]
OmitField = Annotated[
    list[str] | None, typer.Option(help="Not sent, where a server refuses it: temperature, top_p, seed; may repeat.")
]
ExtraBody = Annotated[str | None, typer.Option(help="A JSON object that is added to every request.")]
ApiKeyEnv = Annotated[
    str | None, typer.Option(help="The environment variable with the key; by default OPENAI_API_KEY.")
]


def json_object(text: str | None, option: str) -> dict[str, Any] | None:
    """The JSON object in an option's text.

    Raises:
        typer.BadParameter: it is none.
    """
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        value = text
    if value is not None and not isinstance(value, dict):
        raise typer.BadParameter(f"{option} takes a JSON object like '{{\"top_k\": 1}}'")
    return value


class Verbs(TyperGroup):
    """A group of verbs that ends with a sentence where the user can mend what is wrong."""

    def invoke(self, ctx: Any) -> Any:
        warnings.formatwarning = _format_warning
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("visrl: interrupted; the same command goes on where this one stopped", err=True)
            raise typer.Exit(130) from None
        except (OSError, UserError) as error:
            if isinstance(error, BrokenPipeError) and not _is_read(sys.stdout):
                raise  # who reads what is printed has had enough of it, as `… | head`: no fault, and typer ends it
            typer.echo(f"visrl: {error}", err=True)
            raise typer.Exit(1) from error


def _is_read(stream: TextIO) -> bool:
    """Whether what is printed has a reader: the other end of a pipe is open."""
    poll = select.poll()
    try:
        poll.register(stream, 0)
    except OSError:  # no file of the system's
        return True
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as it is printed: ours is a sentence for the user, whatever line of the program it comes from."""
    if category.__name__ == "VisrlWarning":
        return f"{message}\n"
    return _format_as_python(message, category, filename, lineno, line)


_format_as_python = warnings.formatwarning
