"""A chat template that came with a checkpoint, tried in a process of its own, which can be killed.

Run as a script: reads {"template", "conversations"} from its input and renders each. Imports nothing of ours, so that
it starts in a tenth of a second. How it ends is the answer; what it renders is thrown away.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

SECONDS = 5  # of one core; a template takes a thousandth
MEMORY = 1_000_000_000  # bytes
MOST_CHARACTERS = 200_000  # of a prompt of some hundred
TOO_MUCH, FAILED = 3, 4  # statuses beside 0


def render(template: str, conversations: list[Any]) -> None:
    """Render every conversation as transformers does, counting what comes.

    Raises:
        OverflowError: more text than any prompt has.
    """
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag with which templates mark what a model said."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    made.globals.update(raise_exception=refuse, strftime_now=lambda form: "2025-01-01")
    compiled = made.from_string(template)
    for messages in conversations:
        length = 0
        for piece in compiled.generate(messages=messages, add_generation_prompt=True, tools=None, documents=None):
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise OverflowError(f"more than {MOST_CHARACTERS:,} characters for a prompt of some hundred")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    asked = json.load(sys.stdin)
    try:
        render(asked["template"], asked["conversations"])
    except (OverflowError, MemoryError, RecursionError) as error:
        print(error or type(error).__name__)
        sys.exit(TOO_MUCH)
    except Exception as error:
        print(error)
        sys.exit(FAILED)
