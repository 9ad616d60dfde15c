"""What a prompt needs of a checkpoint, looked for at loading: a chat template that shows images and ends, the token
that stands for an image, and the one that ends a turn.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

from PIL import Image

from visrl.conversation import Conversation, View, answer_conversation, focus_conversation
from visrl.models import template_trial
from visrl.models.candidates import TURNS
from visrl.models.encode import Encoder
from visrl.models.families import FAMILIES, image_token_of
from visrl.models.folder import CheckpointError
from visrl.models.tool_turns import as_messages

QUESTION = "Which number is on the tag?"
WAIT_S = 60  # for a trial that has `template_trial.SECONDS` of a core; a busy machine is slower


def check_processor(processor: Any, config: Any) -> None:
    """Refuse a processor that lacks a part.

    Raises:
        CheckpointError: names the part.
    """
    parts = ("tokenizer", "image_processor", "image_token", "image_token_ids")
    missing = [part for part in parts if getattr(processor, part, None) is None]
    if missing:
        raise CheckpointError(
            f"the processor is a {type(processor).__name__} without {' and '.join(missing)}; "
            "copy the processor's files (processor_config.json or preprocessor_config.json, tokenizer) from the base"
        )
    wanted = image_token_of(config)
    if wanted is not None and config.model_type in FAMILIES and wanted != processor.image_token_ids[0]:
        raise CheckpointError(
            f"the model puts pictures at token {wanted} (config.json), the tokenizer writes "
            f"{processor.image_token_ids[0]} for them; tokenizer and model do not belong together"
        )


def check_template(template: str | None) -> None:
    """Render whatever a template is given here in a process that is killed where it takes too long or too much: it
    came with a checkpoint.

    Raises:
        CheckpointError: no template, or one that does not end.
    """
    if template is None:
        raise CheckpointError(
            "there is no chat template: not in the processor, not in chat_template.jinja or chat_template.json, not in "
            "the tokenizer; copy one from the base model"
        )
    try_template(template, json.dumps([*(as_messages(talk) for talk in _talks()), TURNS]))


def check_prompts(encoder: Encoder) -> None:
    """Render both steps of a question and see what must be in them.

    Raises:
        CheckpointError: a template that leaves out an image or the question, or no token that ends a turn.
    """
    if not isinstance(encoder.end_id, int) or encoder.end_of_turn in (None, ""):
        raise CheckpointError(f"the tokenizer has no token that ends a turn ({encoder.end_of_turn!r})")
    for talk in _talks():
        text = encoder.render(talk)
        shown, wanted = text.count(encoder.image_mark), len(talk.views)
        if shown != wanted:
            raise CheckpointError(
                f"the chat template shows {shown} of {wanted} pictures (as {encoder.image_mark}); it is one for text "
                "alone, or for another model"
            )
        if QUESTION not in text:
            raise CheckpointError("the chat template leaves out what the user says")


def _talks() -> tuple[Conversation, Conversation]:
    view = View("prompt test", Image.new("RGB", (64, 64)))
    return focus_conversation(QUESTION, view), answer_conversation(QUESTION, view, view)


@functools.lru_cache(maxsize=64)
def try_template(template: str, conversations: str) -> None:
    """Render with `template` in a process that is killed where it takes too long or too much.

    Raises:
        CheckpointError: it did.
    """
    asked = json.dumps({"template": template, "conversations": json.loads(conversations)})
    script = [sys.executable, "-I", template_trial.__file__]
    try:
        done = subprocess.run(script, input=asked, capture_output=True, text=True, timeout=WAIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"the chat template does not end within {WAIT_S} s") from error
    if done.returncode < 0:
        raise CheckpointError(f"the chat template does not end within {template_trial.SECONDS} s of a core")
    if done.returncode == template_trial.TOO_MUCH:
        raise CheckpointError(f"the chat template takes too much: {done.stdout.strip()[:200]}")
