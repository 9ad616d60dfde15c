"""Prompts of benchmarks, word for word: line breaks, spaces and spelling are part of what was published."""

from __future__ import annotations

import pytest

from visrl.evaluate import wordings
from visrl.evaluate.benchmarks import BENCHMARKS
from visrl.evaluate.choices import ChoiceQuestion
from visrl.evaluate.questions import BenchmarkQuestion
from visrl.records import Sample

STEM = "What is the NASA logo on?"
CHOICE = BenchmarkQuestion(Sample("1", "a.png", STEM, "B"), choice=ChoiceQuestion(STEM, ("a cup", "a van"), 1))
TREE = BenchmarkQuestion(
    Sample("1", "a.png", STEM, "B", source="Reasoning/Ordering"), choice=CHOICE.choice, text="A. a cup\nB. a van"
)
OCR = BenchmarkQuestion(
    Sample("1", "a.png", f"{STEM}\nA. 1\nB. 2", "B", source="Perception/OCR"), choice=CHOICE.choice, text="A. 1\nB. 2"
)
OPEN = BenchmarkQuestion(Sample("1", "a.png", STEM, "van"))
SELECT = (
    "Select the best answer to the above multiple-choice question based on the image. Respond with only the letter "
    "(A, B, C, D, or E) of the correct option."
)
REASON = (
    "\nSelect the best answer to the above multiple-choice question based on the image. After the reasoning process, "
    "respond with only the letter of the correct option between <answer> and </answer>."
)
DIRECTLY = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("benchmark", "reading", "question", "said"),
    [
        ("vstar", "published", CHOICE, f"{STEM}\n(A) a cup\n(B) a van{DIRECTLY}"),
        ("vstar", "lmms-eval", CHOICE, f"{STEM}\nA. a cup\nB. a van{DIRECTLY}{DIRECTLY}"),
        (
            "vstar", "vlmevalkit", CHOICE,
            f"Question: {STEM}\nOptions:\nA. a cup\nB. a van\n"
            "Please select the correct answer from the options above. \n",
        ),
        ("hrbench4k", "lmms-eval", CHOICE, f"{STEM}\nA. a cup\nB. a van\nAnswer the option letter directly."),
        (
            "mme-realworld", "published", CHOICE,
            f"{STEM} The choices are listed below: \n(A) a cup\n(B) a van\n{SELECT}\nThe best answer is:",
        ),
        (
            "mme-realworld", "vlmevalkit", CHOICE,
            f"{STEM} The choices are listed below:\n(A) a cup\n(B) a van\n{SELECT} \nThe best answer is:",
        ),
        (
            "mme-realworld-lite", "lmms-eval", CHOICE,
            f"{STEM} The choices are listed below:\n(A) a cup\n(B) a van\n{SELECT}\nThe best answer is: ",
        ),
        ("treebench", "published", TREE, f"{STEM} Options:\nA. a cup\nB. a van{REASON}"),
        ("treebench", "published", OCR, f"{STEM}\nA. 1\nB. 2 Options:\nA. 1\nB. 2{REASON}"),  # the script's own mistake
        ("treebench", "vlmevalkit", OCR, f"{STEM}\nA. 1\nB. 2\nAnswer with the correct option's letter directly."),
        ("zoombench", "published", OPEN, STEM),
        ("visualprobe", "published", OPEN, f"\n{STEM}"),
        ("docvqa", "lmms-eval", OPEN, STEM + SHORT),
        ("textvqa", "lmms-eval", OPEN, "What is the nasa logo on?" + SHORT),  # a capital first, and no other
        ("textvqa", "vlmevalkit", OPEN, STEM + SHORT),
        ("chartqa", "lmms-eval", OPEN, f"{STEM}\nAnswer the question with a single word."),
        ("vstar", "ours", CHOICE, f"{STEM}\nA. a cup\nB. a van\nAnswer with the letter of the right option."),
    ],
)  # fmt: skip
def test_a_question_is_put_word_for_word(benchmark: str, reading: str, question: BenchmarkQuestion, said: str) -> None:
    found = BENCHMARKS[benchmark].reading(reading)
    assert found is not None
    assert found.word(question) == said


def test_system_messages_are_those_of_the_published_checkpoints() -> None:
    treebench, zoombench = (BENCHMARKS[name].reading("published") for name in ("treebench", "zoombench"))
    assert treebench
    assert zoombench
    assert (treebench.system, zoombench.system) == (wordings.TREEBENCH_SYSTEM, wordings.ZOOMBENCH_SYSTEM)
    assert treebench.system.startswith("A conversation between user and assistant. The user asks a question, and the A")
    assert treebench.system.endswith("between <box> and </box>. You MUST strictly follow the format.")
    assert zoombench.system.startswith("You are a helpful assistant.\n The assistant first thinks about the reasoning")
    assert zoombench.system.endswith("i.e., reasoning process here <answer> answer here </answer>")
