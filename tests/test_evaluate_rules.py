"""Published rules on replies: each against an oracle written apart from it, and each published fault by hand."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from choice_replies import synthetic_replies

from visrl.evaluate.rules import RULES, treebench_iou
from visrl.zoom.calls import boxes_in_text

REPLIES = synthetic_replies(5000)
ABC = {"A": "red", "B": "blue", "C": "green"}


# --- Oracles: what each source says, from its description, in other words than the package's --------------------------


def inside_first(text: str, start: str, end: str) -> str | None:
    """What stands between the first `start` that an `end` follows, and that `end`."""
    place = text.find(start)
    stop = text.find(end, place + len(start)) if place >= 0 else -1
    return text[place + len(start) : stop] if stop >= 0 else None


def words_of(reply: str) -> list[str]:
    return "".join(" " if letter in ".()[],:;!*#{}" else letter for letter in reply).split()


def lone_letter(reply: str, options: dict[str, str]) -> tuple[str | bool, list[str]]:
    refusals = (
        "Sorry, I can't help with images of people yet.|I can't process this file.|"
        "I'm sorry, but without the image provided|Cannot determine the answer"
    )
    words = words_of(reply)
    if sum(reply.count(sentence) for sentence in refusals.split("|")):
        return "Z", words
    there = set(options) & set(words)
    if not there and "Z" in words:
        return "Z", words
    return (there.pop() if len(there) == 1 else False), words


def texts_in(reply: str, options: dict[str, str]) -> list[str]:
    return [key for key in options if reply.lower().count(options[key].lower())]


def vlmevalkit(reply: str, options: dict[str, str], truth: str) -> float | None:
    letter: str | bool = False
    if reply.find("Failed to obtain answer via API") < 0:
        letter, words = lone_letter(reply, options)
        if letter and letter != "Z" and letter not in words[-4:]:
            letter = False
        elif letter and letter != "Z" and words.index(str(letter)) <= len(words) - 5:
            letter = False  # its first place counts
        if not letter:
            said = re.search(r"answer\s+is\s+\**([abcd])\**", reply, re.I)
            letter = said.group(1).upper() if said and said.group(1).upper() in options else False
    if not letter and len(reply.lower()) <= 2 * len("".join(options.values())):
        found = texts_in(reply, options)
        letter = found[0] if len(found) == 1 else False
    return (1.0 if letter == truth else 0.0) if letter else None


def lmms_hrbench(reply: str, options: dict[str, str], truth: str) -> float | None:
    reply, letter = reply.strip(), False
    if "Failed to obtain answer via API" not in reply:
        letter, _ = lone_letter(reply, options)
    if not letter:
        found = texts_in(reply, options)
        letter = found[0] if len(found) == 1 else False
    return (1.0 if letter == truth else 0.0) if letter else None


def first_of(reply: str, phrases: str, choices: list[str]) -> str:
    reply = reply.strip()
    for phrase in phrases.split("|"):
        reply = "".join(reply.split(phrase))
    capitals = [letter for letter in reply if letter in "ABCDE"]
    if capitals:
        return capitals[0]
    if len(reply.split()) > 10:
        return ""
    holding = [choice for choice in choices if reply.lower() in choice.lower()]
    return holding[0][1] if holding else ""


START = "The best answer is|The correct answer is|The answer is|The answer|"
GLUED = START + "The best option isThe correct option is|Best answer:Best option:"
MENDED = START + "The best option is|The correct option is|Best answer:|Best option:"
MARKS = ["(A)", "(B)", "(C)", "(D)", "(E)"]


def mme(reply: str, options: dict[str, str], truth: str) -> float:
    return 1.0 * (first_of(reply, GLUED, [f"({key}) {options[key]}" for key in options]) == truth)


def lmms_mme(reply: str, options: dict[str, str], truth: str) -> float:
    return 1.0 * (first_of(reply, MENDED, MARKS).lower() == truth.lower())


def vlmevalkit_letter(reply: str, options: dict[str, str], truth: str) -> float:
    tagged = inside_first(reply, "<answer>", "</answer>")
    return 1.0 * (first_of(reply if tagged is None else tagged, MENDED, MARKS) == truth)


def lmms_vstar(reply: str, options: dict[str, str], truth: str) -> float:
    text, letter = reply.strip().upper(), None
    if text[:1] in list("ABCD"):
        letter = text[0]
    if letter is None:
        for word in re.finditer(r"ANSWER|CHOICE|OPTION", text):
            rest = text[word.end() :]
            is_gone = re.match(r"\s+IS(?=[\s:])", rest)
            for tail in [rest[is_gone.end() :], rest] if is_gone else [rest]:
                bare = tail.lstrip(": \t\n\r\x0b\x0c")
                if letter is None and len(bare) < len(tail) and bare[:1] in list("ABCD"):
                    letter = bare[0]
    if letter is None:
        letter = next((text[i + 1] for i in range(len(text) - 2) if text[i] == "(" and text[i + 2] == ")"
                       and text[i + 1] in "ABCD"), None)  # fmt: skip
    if letter is None:
        marked = (one for i, one in enumerate(text) if one in "ABCD" and text[i + 1 :].lstrip()[:1] in list(".)]"))
        letter = next(marked, None)
    if letter is None:
        padded = f" {text} "
        alone = (
            one for one in zip(padded, padded[1:], padded[2:], strict=False) if one[0].isspace() and one[2].isspace()
        )
        letter = next((one for _, one, _ in alone if one in "ABCD"), None)
    if letter is None:
        all_letters = [one for one in text if one in "ABCD"]
        letter = all_letters[0] if len(all_letters) == 1 else None
    return 1.0 * (letter == truth)


def deepeyes(reply: str, options: dict[str, str], truth: str) -> float | None:
    said = reply
    if reply.count("<answer>") and reply.count("</answer>"):
        said = reply[reply.index("<answer>") + 8 :]
        other = said.find("<answer>")
        said = said if other < 0 else said[:other]
        said = said.partition("</answer>")[0].strip()
    if "\\boxed" in said:
        if "\\boxed{" not in said:
            return 0.0
        said = said[said.index("\\boxed{") + 7 :]
        said = said.partition("\\boxed{")[0].partition("}")[0]
    if len(said) in (1, 2) and (len(said) == 1 or "." in said):
        return float(said == truth) if len(said) == 1 else float(said.count(truth) > 0)
    return 1.0 if said.find(truth + ". " + options[truth]) >= 0 else None


def treebench(reply: str, options: dict[str, str], truth: str) -> float:
    tagged = inside_first(reply, "<answer>", "</answer>")
    said = reply if tagged is None else tagged.strip()
    return 1.0 if said in (truth, truth.lower()) else 0.0


def zoom_said(reply: str) -> str:
    if "<answer>" in reply:
        cut = reply[reply.index("<answer>") : reply.find("</answer>")]
        return cut.replace("<answer>", "")
    place = reply.find("Answer:")
    return reply[place:] if place >= 0 else "\n".join(reply.rsplit("\n", 3)[-3:])


def zoombench(reply: str, options: dict[str, str], truth: str) -> float | None:
    return 1.0 if zoom_said(reply).strip().casefold() == truth.casefold() else None


def zoom_choice(reply: str, options: dict[str, str], truth: str) -> float | None:
    said = zoom_said(reply)
    capital = [i for i, one in enumerate(said) if "A" <= one <= "Z"]
    in_brackets = [i for i in capital if said[i - 1 : i] == "(" and said[i + 1 : i + 2] == ")"]
    before_mark = [i for i in capital if said[i + 1 : i + 2] and (said[i + 1] in ".)" or said[i + 1].isspace())]
    place = next((found[0] for found in (in_brackets, before_mark, capital) if found), None)
    is_right = zoombench(reply, options, truth) or (place is not None and said[place] == truth)
    return 1.0 if is_right else None


def visualprobe(reply: str, options: dict[str, str], truth: str) -> float | None:
    return 0.0 if inside_first(reply, "<answer>", "</answer>") is None else None


ORACLES: dict[str, Callable[..., float | None]] = {
    "deepeyes": deepeyes, "hrbench": lambda *_: None, "mme-realworld": mme, "treebench": treebench,
    "zoombench": zoombench, "zoom-choice": zoom_choice, "visualprobe": visualprobe, "vlmevalkit": vlmevalkit,
    "vlmevalkit-letter": vlmevalkit_letter, "lmms-eval-vstar": lmms_vstar, "lmms-eval-hrbench": lmms_hrbench,
    "lmms-eval-mme-realworld": lmms_mme,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in RULES if name != "strict"])
def test_a_published_rule_agrees_with_its_oracle_on_every_reply(name: str) -> None:
    rule = RULES[name]
    scores = [rule.score(*one) for one in REPLIES]
    for (reply, options, truth), score in zip(REPLIES, scores, strict=True):
        assert score == ORACLES[name](reply, options, truth), (reply, options, truth)
    assert set(scores) <= {0.0, 1.0, None}
    assert rule.asks_judge == (None in scores)  # who asks no judge decides every reply
    assert name == "hrbench" or 1.0 in scores or name == "visualprobe"


# --- The faults, as published --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reply", "read"),
    [
        ("mme-realworld", "Because it is green", "B"),  # a letter cut out of a word
        ("mme-realworld", "Best answer: C", "B"),  # the phrase's own capital: a comma is missing in the list
        ("mme-realworld", "The best option is C", "C"),
        ("mme-realworld", "", "A"),
        ("lmms-eval-mme-realworld", "Best answer: C", "C"),
        ("lmms-eval-mme-realworld", "", "A"),
        ("lmms-eval-vstar", "Because it is green", "B"),
        ("lmms-eval-vstar", "Answer: C", "A"),
        ("vlmevalkit", "B, as the second word of these says it", None),  # not among the last words
        ("vlmevalkit", "I would say that it is B", "B"),
        ("lmms-eval-hrbench", "B, as the second word of these says it", "B"),
        ("vlmevalkit-letter", "<answer>C</answer> not Because", "C"),
        ("deepeyes", "B.", "B"),
        ("zoom-choice", "The (C) one", "C"),
        ("treebench", "<answer> c </answer>", "C"),
        ("treebench", "c", "C"),
        ("treebench", "C.", None),
    ],
)  # fmt: skip
def test_each_published_fault_is_kept(name: str, reply: str, read: str | None) -> None:
    assert [letter for letter in ABC if RULES[name].score(reply, ABC, letter) == 1.0] == ([read] if read else [])


@pytest.mark.parametrize("reply", ["Because it is green", "", "A red car", "B or C", "z", "Best of all"])
def test_ours_reads_no_letter_out_of_a_word_and_counts_it_wrong(reply: str) -> None:
    assert [RULES["strict"].score(reply, ABC, letter) for letter in ABC] == [0.0, 0.0, 0.0]


def test_ours_reads_what_plainly_names_an_option_and_nothing_that_is_thought_aloud() -> None:
    for reply in ("C", "(c)", "C. green", "The answer is C.", "green", "<think>B? A?</think> C", "<answer>C</answer>"):
        assert RULES["strict"].score(reply, ABC, "C") == 1.0, reply


def test_treebench_boxes_are_recalled_alone() -> None:
    """Two true boxes: one is hit exactly, the other by IoU 0.5, whatever else is written: (1 + 0.5) / 2."""
    truths = [(0, 0, 10, 10), (20, 20, 40, 40)]
    reply = "<box>[0,0,10,10]</box> or <box>[20,20,40,30]</box> or <box>[1,1,9,9]</box>"
    assert treebench_iou(reply, truths) == pytest.approx(0.75)
    assert treebench_iou(reply + "<box>[0,0,900,900]</box>" * 9, truths) == pytest.approx(0.75)
    assert treebench_iou("<box>[0, 0, 10, 10]</box>", truths) == treebench_iou(reply, []) == 0.0
    assert boxes_in_text(f"<box>[{'9' * 5000},1,2,3]</box><box>[4,5,3,9]</box><box>[1,2,3,4] </box>") == [(1, 2, 3, 4)]


def test_treebench_iou_agrees_with_an_oracle_that_counts_pixels() -> None:
    truths = [(0, 0, 50, 50), (10, 20, 60, 90)]
    seen = 0
    for reply, _, _ in REPLIES[:800]:
        boxes = [tuple(map(int, four.split(","))) for four in re.findall(r"<box>\s*\[(\d+,\d+,\d+,\d+)\]", reply)
                 if "</box>" in reply]  # fmt: skip
        cells = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in boxes if b[0] < b[2]]
        best = [
            max((len(own & cell) / len(own | cell) for cell in cells), default=0.0)
            for own in ({(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in truths)
        ]
        seen += bool(boxes)
        assert treebench_iou(reply, truths) == pytest.approx(sum(best) / 2), reply
    assert seen > 20
