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
    crop_view,
    looks_conversation,
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
    details: Sequence[Box] | None = None,
) -> list[TrainingRow]:
    """The rows of a sample whose true looks are known (`Sample.true_looks`): (image, question, crops of the looks
    before → box) for each look, and (image, question, all crops → answer), which with no look is the answer at once.
    One of which nothing says where to look gives (image, question → answer), asked in the one turn of the evaluation's
    mode `no_box`: prompts of the looks ask for boxes first, and what answers them without one would unlearn to look.

    A crop is that of its box as the box's text says it, so that warm-up and rollout see the same windows; `details`
    puts other boxes in their place (a curriculum's, which are a little off).

    Raises:
        ImageError, PromptError: the image cannot be opened, or the row not be shown to the model.
    """
    name, looks = sample.id, sample.true_looks
    if not looks and not sample.answer:
        raise PromptError(f"row {name} has neither a box nor an answer: there is nothing to learn from it")
    whole = open_view(Picture(sample.image, size=sample.size), root)
    if looks is None:
        talk = plain_conversation(sample.question, whole)
        return [TrainingRow(f"{name}/answer", "answer", talk, (("target", sample.answer),))] if "read" in tasks else []
    try:
        processed = encoder.processed_size(whole.size)
    except PromptError as error:
        raise PromptError(f"row {name}, {sample.image[:80]}: {error}") from error
    texts = [encoder.codec.format(box, whole.size, processed) for box in looks]
    said = [encoder.codec.parse(text, whole.size, processed) for text in texts]
    crops = [crop_of(whole, box, encoder) for box in (said if details is None else details)]
    rows = []
    for place, text in enumerate(texts if "locate" in tasks else ()):
        talk = looks_conversation(sample.question, whole, crops[:place])
        rows.append(TrainingRow(f"{name}/box{place + 1 if place else ''}", "box", talk, (("target", text),)))
    if "read" in tasks and sample.answer:
        talk = looks_conversation(sample.question, whole, crops)
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
