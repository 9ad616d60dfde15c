"""A sample or a preference as rows to train on: the conversation that the model is shown, and its responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from visrl.box import Box
from visrl.conversation import (
    Conversation,
    Message,
    PromptError,
    View,
    answer_conversation,
    crop_view,
    focus_conversation,
    open_view,
)
from visrl.models.encode import Encoder
from visrl.prompts import IMAGE
from visrl.records import Picture, Preference, Sample
from visrl.rollout.protocols import plain_conversation
from visrl.train.items import Role, TrainingRow

if TYPE_CHECKING:
    from visrl.train.config import Task


def sft_rows(
    encoder: Encoder,
    sample: Sample,
    tasks: Sequence[Task] = ("locate", "read"),
    *,
    root: str | Path | None = None,
    detail: Box | None = None,
) -> list[TrainingRow]:
    """The rows that a sample with a true box gives: (image, question → box) and (image, question, crop → answer). One
    without a box gives (image, question → answer), asked in the one turn of the evaluation's mode `no_box`: the prompts
    of the two steps ask for a box first, and what answers them without one would unlearn to look.

    The crop is that of the box as its text says it, so that warm-up and rollout see the same windows; `detail` puts
    another box in its place (a curriculum's, which is a little off).

    Raises:
        ImageError, PromptError: the image cannot be opened, or the row not be shown to the model.
    """
    name = sample.id
    if sample.box is None and not sample.answer:
        raise PromptError(f"row {name} has neither a box nor an answer: there is nothing to learn from it")
    whole = open_view(Picture(sample.image, size=sample.size), root)
    if sample.box is None:
        talk = plain_conversation(sample.question, whole)
        return [TrainingRow(f"{name}/answer", "answer", talk, (("target", sample.answer),))] if "read" in tasks else []
    try:
        processed = encoder.processed_size(whole.size)
    except PromptError as error:
        raise PromptError(f"row {name}, {sample.image[:80]}: {error}") from error
    text = encoder.codec.format(sample.box, whole.size, processed)
    said = encoder.codec.parse(text, whole.size, processed)
    rows = []
    if "locate" in tasks:
        talk = focus_conversation(sample.question, whole)
        rows.append(TrainingRow(f"{name}/box", "box", talk, (("target", text),)))
    if "read" in tasks and sample.answer:
        talk = answer_conversation(sample.question, whole, crop_of(whole, detail or said, encoder))
        rows.append(TrainingRow(f"{name}/answer", "answer", talk, (("target", sample.answer),)))
    return rows


def crop_of(whole: View, box: Box, encoder: Encoder) -> View:
    """The crop of `box`, under the checkpoint's own crop rule."""
    return crop_view(whole, Picture(whole.key, box), encoder.settings.crop_rule)


def preference_row(
    encoder: Encoder, preference: Preference, root: str | Path | None = None, item: str | None = None
) -> TrainingRow:
    """The row of one preference: its prompt and images with the chosen and the rejected response. `item` is the name
    of its item where it belongs to a data set, whose ids may repeat."""
    first, *details = preference.images
    whole = open_view(first, root)
    views = [whole] + [crop_of(whole, detail.crop, encoder) for detail in details if detail.crop]
    talk = Conversation((*preference.context, Message("user", preference.prompt)), tuple(views))
    if preference.context:
        _check_kept(encoder, talk)
    responses: tuple[tuple[Role, str], ...] = (("chosen", preference.chosen), ("rejected", preference.rejected))
    return TrainingRow(
        f"{item or preference.id}/{preference.step}", preference.step, talk, responses, preference.weight
    )


def _check_kept(encoder: Encoder, talk: Conversation) -> None:
    """That the model's chat template shows the whole conversation: some leave out system messages or earlier turns.

    Raises:
        PromptError: it does not; the message says what is left out.
    """
    shown = encoder.render(talk)
    for message in talk.messages:
        if any(part.strip() not in shown for part in message.text.split(IMAGE)):
            raise PromptError(
                f"the model's chat template leaves out what the {message.role} says before the question: "
                f"{message.text[:60]!r}; take it out of the data, or train another model"
            )
