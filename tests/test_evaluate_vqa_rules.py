"""The toolkits' scores over several references, against oracles written apart from them."""

from __future__ import annotations

import random

import pytest

from visrl.evaluate.vqa_rules import VQA_RULES

WORDS = (
    "two", "ten", "None", "the", "a", "red", "Red", "car's", "its", "dont", "don't", "hadnt've", "ow's'at", "12",
    "12.5", "12,500", "5%", "0", "0%", "1e3", "nan", "inf", "1_000", "U.S.A.", "a.b", ".5", "5.", "?", "-", "x-ray",
    "a/b", "(b)", '"q"', "¿", "naïve", "", "  ", "\n", "somebody'd", "y'alld've", "100", "105", "95.0", "-95", "+100",
    "one,two", "!",
)  # fmt: skip


def made(count: int) -> list[tuple[str, list[str]]]:
    """Replies and their references: from the same words, with some words, spaces and signs exchanged."""
    rng = random.Random(11)
    found = []
    for _ in range(count):
        answer = rng.choice((" ", "  ", "")).join(rng.choices(WORDS, k=rng.randint(1, 4)))
        references = [answer if rng.random() < 0.5 else rng.choice(WORDS) for _ in range(rng.choice((1, 2, 10)))]
        reply = rng.choice((answer, answer.upper(), f" {answer} ", f"{answer}.", rng.choice(WORDS), answer[:-1]))
        found.append((reply, references))
    return found


CASES = made(5000)


def distance(a: str, b: str) -> int:
    """Edit distance by its recursion, over a whole table."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(change, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return table[len(a), len(b)]


def anls(reply: str, references: list[str]) -> float:
    shares = []
    for truth in references:
        longer = len(truth) if len(truth) > len(reply) else len(reply)
        shares.append(
            distance(" ".join(truth.lower().split()), " ".join(reply.lower().split())) / longer if longer else 0
        )
    score = 1 - min(shares)
    return 0.0 if score < 0.5 else score


def relaxed(reply: str, truth: str) -> bool:
    numbers = []
    for text in (reply, truth):
        try:
            numbers.append(float(text.rstrip("%")) / 100.0 if text[-1:] == "%" else float(text))
        except ValueError:
            numbers.append(None)
    said, meant = numbers
    if said is None or meant is None or meant == 0:
        return reply.lower() == truth.lower()
    return abs(said - meant) / abs(meant) <= 0.05


NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "ten": "10"}
APOSTROPHES = {
    "dont": "don't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "ow's'at": "'ow's'at", "somebody'd": "somebodyd",
    "y'alld've": "y'all'd've",
}  # fmt: skip


def vqa_text(text: str) -> str:
    text = "".join(" " if letter in "\n\t" else letter for letter in text).strip()
    has_comma = any(
        text[i].isdecimal() and text[i + 1] == "," and text[i + 2].isdecimal() for i in range(len(text) - 2)
    )
    kept = ""
    for letter in text:
        if letter not in ';/[]"{}()=+\\_-><@`,?!':
            kept += letter
        elif not (has_comma or letter + " " in text or " " + letter in text):
            kept += " "
    plain, stops = "", 0
    for place, letter in enumerate(kept):
        is_stop = letter == "." and not kept[place + 1 : place + 2].isdecimal() and stops < 32
        stops += is_stop
        plain += "" if is_stop else letter
    words = [NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in {"a", "an", "the"})


def vqa(reply: str, references: list[str]) -> float:
    accuracies = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        accuracies.append(min(1, others.count(reply) / 3))
    return sum(accuracies) / len(accuracies)


def lmms_text(text: str) -> str:
    return vqa_text(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


ORACLES = {
    "anls": anls,
    "lmms-eval-vqa": lambda reply, references: vqa(lmms_text(reply), [lmms_text(one) for one in references]),
    "vlmevalkit-vqa": lambda reply, references: vqa(vqa_text(reply), [vqa_text(one) for one in references]),
    "lmms-eval-relaxed": lambda reply, references: float(relaxed(reply, references[0])),
    "vlmevalkit-relaxed": lambda reply, references: max(float(relaxed(reply.strip(), one)) for one in references),
}


@pytest.mark.parametrize("name", list(VQA_RULES))
def test_a_rule_agrees_with_its_oracle_on_every_reply(name: str) -> None:
    scores = [VQA_RULES[name](*case) for case in CASES]
    for case, score in zip(CASES, scores, strict=True):
        assert score == ORACLES[name](*case), case
    assert 0.1 < sum(scores) / len(scores) < 0.95


@pytest.mark.parametrize(
    ("name", "reply", "references", "score"),
    [
        ("anls", "abc", ["abd"], 1 - 1 / 3),
        ("anls", "abc   ", ["abd"], 1 - 1 / 6),  # spaces at its end make a wrong letter cheaper
        ("anls", "ab", ["cd"], 0.0),
        ("lmms-eval-relaxed", "0.0", ["0"], 0.0),  # a truth of 0 needs its own text
        ("lmms-eval-relaxed", "5%", ["5"], 0.0),
        ("lmms-eval-relaxed", " 104", ["100"], 1.0),
        ("lmms-eval-relaxed", "blue ", ["blue"], 0.0),
        ("vlmevalkit-relaxed", "blue ", ["red", "blue"], 1.0),
        ("lmms-eval-vqa", "The two", ["2"] * 3 + ["x"] * 7, (3 * 2 / 3 + 7) / 10),
        ("vlmevalkit-vqa", "dont", ["don't"] * 10, 1.0),
    ],
)
def test_each_habit_by_hand(name: str, reply: str, references: list[str], score: float) -> None:
    assert VQA_RULES[name](reply, references) == pytest.approx(score)
