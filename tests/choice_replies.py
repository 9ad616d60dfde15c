"""Synthetic replies to questions of choice, of every kind that models write."""

from __future__ import annotations

import random

QUESTIONS = (
    {"A": "red", "B": "blue", "C": "green", "D": "A red car"},
    {"A": "The bag is on the left side of the man.", "B": "The bag is on the right side of the man."},
    {"A": "5", "B": "15", "C": "50", "D": "8", "E": "The image does not feature the number."},
    {"A": "Yes", "B": "No", "C": "unsure", "D": "Cannot determine the answer", "E": "none", "F": "both"},
)
FORMS = (
    "{x}", "({x})", "{x}.", "{x})", " {x}\n", "{x}. {text}", "({x}) {text}", "{text}", "{low}", "**{x}**",
    "{x}, I think", "The answer is {x}", "The answer is {x}.", "the correct answer is **{x}**",
    "The best answer is ({x})",
    "Answer: {x}", "ANSWER: {x}", "Best answer: {x}", "Best option:{x}", "The best option is {x}",
    "The correct option is {x}",
    "The best option isThe correct option is {x}", "Best answer:Best option: {x}", "Option {x}", "OPTION {x}",
    "Because it looks {text}", "BECAUSE {x}", "A closer look says {x}", "{x} or {y}", "Not {y} but {x}", "{x} {y} {x}",
    "<answer>{x}</answer>", "<answer> {low} </answer>", "<answer>{x}. {text}</answer>", "<answer>{x}", "</answer>{x}",
    "<think>{y}? no, [1,2]</think><answer>{x}</answer>", "<answer>{y}</answer> <answer>{x}</answer>", "\\boxed{{{x}}}",
    "\\boxed {x}", "\\boxed{{{text}}}", "<answer>\\boxed{{{x}}} and {y}</answer>", "I can't process this file. {x}",
    "Failed to obtain answer via API. {x}", "Failed to obtain answer via API. The answer is {x}", "Z", "z", "",
    " ", "\n",
    "{text} {text} {text} {text} {text} {text} {text}", "i see {text} and nothing else in all of this picture at all",
    "one two three four five six seven eight nine ten eleven", "{x} one two three four five six seven eight nine ten",
    "one two three four five {x} six seven eight", "one two three {x} four five six", "Ünïcode ẞ {x}", "（{x}）",
    "[{x}]",
    "<box>[1,2,30,40]</box> {x}", "<box>[ 1,2,30,40 ]</box>", "<box>[10,10,60,60]</box><box>[0,0,50,50]</box>{x}",
    "<box> [5,5,95,95] and </box>", "<box>[9,9,3,3]</box>", "<box>[1, 2, 30, 40]</box>", "<box>[1.5,2,30,40]</box>",
    "line one\nline two\nAnswer: {x}\nline four\nline five", "line {y}\nline two\nline three\n{text}", "score 1) {x}]",
    "Sorry, I can't help with images of people yet.", "Cannot determine the answer", "The {text}; hence {x}!",
)  # fmt: skip


def synthetic_replies(count: int, seed: int = 7) -> list[tuple[str, dict[str, str], str]]:
    """`count` triples of reply, options and true letter; every form of reply comes with every kind of question."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        options = dict(QUESTIONS[number // len(FORMS) % len(QUESTIONS)])
        letters = list(options)
        x, y, truth = rng.choice(letters), rng.choice(letters), rng.choice(letters)
        text = options[x].upper() if rng.random() < 0.1 else options[x]
        reply = FORMS[number % len(FORMS)].format(x=x, y=y, text=text, low=x.lower())
        if rng.random() < 0.15:
            place = rng.randrange(len(reply) + 1)
            reply = reply[:place] + rng.choice("ABCDEFZ .,:;()[]*\n<>x") + reply[place + rng.randrange(2) :]
        found.append((reply, options, truth))
    return found
