"""An episode of several looks as a pure state: a turn of the model goes in, the next conversation or the end comes out.

    episode = begin(protocol, question, whole)
    while episode.end is None:
        text = …complete(episode.conversation)…
        episode = advance(episode, text, shown)

Every state leaves the one before it as it was, so that one look may be continued in many ways. The pictures of a
conversation and the marks in its texts are always as many: a turn gets whole observations or none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from visrl.box import Box, BoxError, Corners, Size, Window, clamp
from visrl.conversation import Conversation, View
from visrl.prompts import without_marks
from visrl.records import End, Message
from visrl.replies import spoken, whole_text
from visrl.zoom.calls import BadCall, ZoomCall
from visrl.zoom.protocols import Crop, ZoomProtocol
from visrl.zoom.windows import WindowError

UNFINISHED: tuple[End, ...] = ("turns", "pictures", "tokens")


@dataclass(frozen=True, slots=True)
class ZoomedLook:
    """One look of an episode: the turn that asked for it and its text, the picture it was cut from (0 the whole, n the
    n-th crop), the window in that picture's pixels, and what of the whole image it shows."""

    turn: int
    text: str
    source: int
    window: Window
    box: Box
    label: str | None = None


@dataclass(frozen=True, slots=True)
class Episode:
    """Where an episode stands: what was said, what was shown, and whether it has ended.

    `pictures` are those that crops may be cut from, `views` what was shown in the order of the marks; they differ where
    a protocol cuts from the pixels before they are brought to size. `errors` are the replies to calls that could not be
    followed.
    """

    protocol: ZoomProtocol
    question: str
    messages: tuple[Message, ...]
    views: tuple[View, ...]
    pictures: tuple[View, ...]
    boxes: tuple[Box, ...]  # of the pictures, in the whole image
    looks: tuple[ZoomedLook, ...] = ()
    errors: tuple[str, ...] = ()
    turn: int = 0
    prefill: str = ""
    end: End | None = None
    answer: str | None = None
    error: str | None = None
    final: bool = False  # out of turns, and asked for its answer

    @property
    def conversation(self) -> Conversation:
        """What the model is shown next."""
        return Conversation(self.messages, self.views, prefill=self.prefill)


def begin(protocol: ZoomProtocol, question: str, whole: View) -> Episode:
    """The episode of a question about an image."""
    system = (Message("system", protocol.system),) if protocol.system else ()
    asked = Message("user", protocol.ask(question))
    everything = Box(0, 0, 1, 1)
    return Episode(protocol, question, (*system, asked), (whole,), (whole,), (everything,), prefill=protocol.prefill)


def advance(episode: Episode, text: str, shown: Size, cut_short: bool = False) -> Episode:
    """`episode` after the model's turn `text`. `shown` is the size that the processor gives the whole image;
    `cut_short` says that the turn ended for want of tokens; one that came to a stop text first did not."""
    protocol = episode.protocol
    heard, stopped = _until_stop(text, protocol.stop)
    said, cut_short = episode.prefill + without_marks(heard), cut_short and not stopped
    if episode.final:
        answered = _spoken(episode, said)
        return replace(answered, end="answered", answer=said.rpartition("<answer>")[2].split("</answer>")[0].strip())
    is_last = episode.turn + 1 >= protocol.max_turns
    if protocol.last_answers and is_last:
        return replace(_spoken(episode, said), end="answered", answer=spoken(said))
    turn = protocol.read(said)
    if protocol.boxes_in_text is not None:
        episode = _with_mentions(episode, said, protocol.boxes_in_text(said), shown)
    if turn.answer is not None:
        return replace(_spoken(episode, said), end="answered", answer=turn.answer)
    if cut_short:
        return replace(_spoken(episode, said), end="tokens")
    if not turn.calls and not protocol.goes_on:
        return replace(_spoken(episode, said), end="no_call")
    if is_last:
        return _out_of_turns(episode, said)
    if not turn.calls:
        return replace(episode, prefill=said, turn=episode.turn + 1)
    if len(episode.views) + len(turn.calls) > protocol.max_pictures:
        return replace(_spoken(episode, said), end="pictures")
    return _observed(_spoken(episode, said), said, turn.calls, shown)


def _until_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """`text` up to and with its first stop text, and whether it has one."""
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _spoken(episode: Episode, said: str) -> Episode:
    if not episode.protocol.keeps_turns:
        return episode
    return replace(episode, messages=(*episode.messages, Message("assistant", said)), prefill="")


def _out_of_turns(episode: Episode, said: str) -> Episode:
    """The end, or where the protocol has words for it one more turn that opens with them."""
    opening = episode.protocol.final_prefill
    if opening is None:
        return replace(_spoken(episode, said), end="turns")
    return replace(episode, prefill=said + opening, turn=episode.turn + 1, final=True)


def _with_mentions(episode: Episode, text: str, corners: list[Corners], shown: Size) -> Episode:
    """`episode` with the boxes that a turn speaks of; nothing is cut for them."""
    looks = []
    width, height = shown
    for x0, y0, x1, y1 in corners:
        try:
            inside = clamp(x0 / width, y0 / height, x1 / width, y1 / height).box
        except BoxError:
            continue
        left, top, right, bottom = map(round, inside.to_pixels(episode.views[0].size))
        looks.append(ZoomedLook(episode.turn, text, 0, (left, top, right, bottom), inside))
    return replace(episode, looks=(*episode.looks, *looks))


def _observed(episode: Episode, said: str, asked: tuple[ZoomCall | BadCall, ...], shown: Size) -> Episode:
    """`episode` with what the calls of the turn `said` show, in one turn of the user."""
    turn, texts, protocol = episode.turn, [], episode.protocol
    for call in asked:
        try:
            episode, text = _look(episode, said, call, shown)
        except WindowError as failed:
            # Its words may quote the call, whose strings hold what escapes in JSON stand for: marks, half characters.
            why = whole_text(without_marks(str(failed)))
            if protocol.on_failure == "end":
                return replace(episode, end="no_call", errors=(*episode.errors, why))
            episode, text = _failed(episode, said, why, shown)
        texts.append(text)
    *before, last = episode.messages
    shown_in = Message("user", protocol.join(texts))
    grown = (*before, last, shown_in) if protocol.keeps_turns else (*before, Message("user", last.text + shown_in.text))
    if protocol.asked is not None:
        first = 1 if protocol.system else 0
        grown = (*grown[:first], Message("user", protocol.asked(episode.question)), *grown[first + 1 :])
    return replace(episode, messages=grown, turn=turn + 1, prefill=protocol.prefill)


def _look(episode: Episode, text: str, call: ZoomCall | BadCall, shown: Size) -> tuple[Episode, str]:
    """`episode` with the crop of a call, and the words it is shown in.

    Raises:
        WindowError: the call cannot be followed.
    """
    if isinstance(call, BadCall):
        raise WindowError(call.error)
    protocol = episode.protocol
    source = call.source if protocol.any_source else 0
    if not 0 <= source < len(episode.pictures):
        raise WindowError(protocol.no_source(len(episode.pictures)))
    picture = episode.pictures[source]
    mapped = source == 0 and "unmapped_coordinates" not in protocol.faults
    window = protocol.window(call.numbers, picture.size, shown if mapped else picture.size)
    name = protocol.crop_name(call, window) if protocol.crop_name else f"{protocol.name}:{','.join(map(str, window))}"
    key = f"{picture.key}#{name}"
    crop = View(key, picture.image.crop(window), is_crop=True)
    resized = protocol.resize(crop.image)
    view = crop if resized is crop.image else View(f"{key}@{resized.width}x{resized.height}", resized, is_crop=True)
    number = episode.turn + 1 if "labels_count_turns" in protocol.faults else len(episode.pictures)
    box = _within(episode.boxes[source], Box.from_pixels(window, picture.size))
    named = protocol.box_of(call) if protocol.box_of else box
    grown = replace(
        episode,
        views=(*episode.views, view),
        pictures=(*episode.pictures, view if protocol.crops_are_as_shown else crop),
        boxes=(*episode.boxes, box),
        looks=(*episode.looks, ZoomedLook(episode.turn, text, source, window, named, call.label)),
    )
    return grown, protocol.observe(Crop(view.size, episode.turn, number, episode.question))


def _failed(episode: Episode, text: str, error: str, shown: Size) -> tuple[Episode, str]:
    """What a call gets that cannot be followed."""
    protocol, looks = episode.protocol, episode.looks
    grown = replace(episode, errors=(*episode.errors, error))
    if protocol.on_failure == "say":
        return grown, protocol.say_error(error)
    if protocol.whole_call is not None:
        grown, words = _look(grown, text, protocol.whole_call, shown)
        return replace(grown, looks=looks), words
    whole = episode.views[0]
    grown = replace(
        grown, views=(*episode.views, whole), pictures=(*episode.pictures, whole),
        boxes=(*episode.boxes, episode.boxes[0]),
    )  # fmt: skip
    return grown, protocol.observe(Crop(whole.size, episode.turn, len(episode.pictures), episode.question))


def _within(outer: Box, inner: Box) -> Box:
    """A box in a part of an image, in the image."""
    return Box(
        outer.x0 + inner.x0 * outer.width, outer.y0 + inner.y0 * outer.height,
        min(1.0, outer.x0 + inner.x1 * outer.width), min(1.0, outer.y0 + inner.y1 * outer.height),
    )  # fmt: skip
