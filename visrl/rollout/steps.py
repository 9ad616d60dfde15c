"""The two steps of a rollout as pure functions: conversations and completions in, looks out. Knows no engine.

    request = protocol.focus(question, image)          step 1: where to look
    look = look_of(question, image, completion, …)     its box, or why there is none
    look = cut(look, crop_rule)                        its crop
    request = answer_request(look, protocol)           step 2: what is there
    look = finish(look, completion)                    its answer, or why there is none

Every step leaves the look before it as it was, so that one box may get many answers. Who samples the completions, and
how many at a time, is the driver's business: `rollout.roll_out` (sampled, batched),
`greedy.greedy_looks` (temperature 0, batched) and `serve.focus` (one request, asynchronous).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from PIL import Image

from visrl.box import Box, BoxError, CropRule, Size
from visrl.codecs import Codec
from visrl.conversation import Conversation, View, crop_view
from visrl.engines.base import Completion
from visrl.records import End, Origin, Picture
from visrl.replies import spoken
from visrl.rollout.protocols import VISRL, LookProtocol
from visrl.zoom.episode import ZoomedLook

WHOLE = Box(0, 0, 1, 1)


@dataclass(frozen=True, slots=True)
class Look:
    """One look on its way to an answer: what was written, where it points, or why it points nowhere.

    `text` and `answer` are what the policy said without what it thought aloud; the completions are what the engine gave
    for the two steps, None where it was not asked (a control's box, a box without an answer). The first word of `error`
    says what failed: `engine` (no text came), `prompt` (the model cannot be shown this), `box` (the text is no box),
    `no_room` (the diversity controller found no place) or `control` (there is no such box). An empty text is a reply:
    a wrong one.

    Where a protocol looks several times, `looks` are all of them, and box, text and crop those of the last; `end` says
    how the episode came to its end.
    """

    question: str
    whole: View
    text: str = ""
    box: Box | None = None
    error: str | None = None
    answer: str | None = None
    origin: Origin = "sampled"
    seed: int = 0  # of the answer
    fault: str | None = None  # why `text` holds no box, in the codec's words
    detail: View | None = field(default=None, repr=False)  # the crop, as a model is shown it
    box_completion: Completion | None = field(default=None, repr=False)
    answer_completion: Completion | None = field(default=None, repr=False)
    looks: tuple[ZoomedLook, ...] | None = None
    end: End | None = None

    @property
    def box_pixels(self) -> tuple[float, float, float, float] | None:
        """The box's corners (x0, y0, x1, y1) in pixels of the image, which is upright."""
        return self.box.to_pixels(self.whole.size) if self.box else None

    @property
    def crop(self) -> Image.Image | None:
        """What the answer was given from beside the whole image, in the image's own pixels."""
        return self.detail.image if self.detail else None


def look_of(question: str, whole: View, completion: Completion, codec: Codec, processed: Size) -> Look:
    """The look that a completion of step 1 asks for; `processed` is the size that the processor gives the image."""
    look = Look(question, whole, box_completion=completion)
    if completion.text is None:
        return replace(look, error=no_text(completion))
    text = spoken(completion.text)
    try:
        return replace(look, text=text, box=codec.parse(text, whole.size, processed))
    except BoxError as fault:
        cut_short = "; the reply ended inside its thinking" if completion.text and not text else ""
        return replace(look, text=text, error=f"box: {fault}{cut_short}", fault=str(fault))


def with_box(look: Look, box: Box, codec: Codec, processed: Size) -> Look:
    """`look` at a box that no policy wrote, its text as the policy would write it."""
    return replace(look, text=codec.format(box, look.whole.size, processed), box=box)


def cut(look: Look, crop_rule: CropRule) -> Look:
    """`look` with the crop of its box; the whole image in place of a crop where it has no box."""
    return replace(look, detail=crop_view(look.whole, Picture(look.whole.key, look.box or WHOLE), crop_rule))


def answer_request(look: Look, protocol: LookProtocol = VISRL) -> Conversation:
    """Step 2 of a look that has been cut.

    Raises:
        PromptError: what the policy wrote of its box cannot be shown to it again.
    """
    assert protocol.answer is not None  # a protocol that asks for boxes only has nothing to answer
    assert look.detail is not None
    return protocol.answer(look.question, look.whole, look.text, look.detail)


def finish(look: Look, completion: Completion) -> Look:
    """`look` with its answer, or with why there is none."""
    if completion.text is None:
        return replace(look, answer=None, error=no_text(completion), answer_completion=completion)
    return replace(look, answer=spoken(completion.text), error=None, answer_completion=completion)


def no_text(completion: Completion) -> str:
    """The error of a completion that has no text."""
    return f"{'prompt' if completion.refused else 'engine'}: {completion.error or 'no text'}"
