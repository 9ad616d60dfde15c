"""How a question of a benchmark is put, word for word: as its authors put it, as the toolkits do, and our own way.

Line breaks, spaces and spelling are part of what was published. Sources and commits are in readings.py.
"""

from __future__ import annotations

import re

from visrl.evaluate.choices import ChoiceQuestion
from visrl.evaluate.questions import BenchmarkQuestion

TREEBENCH_SYSTEM = (
    "A conversation between user and assistant. The user asks a question, and the Assistant solves it. The assistant "
    "MUST first think about the reasoning process in the mind and then provide the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively. When referring "
    "to particular objects in the reasoning process, the assistant MUST localize the object with bounding box "
    "coordinates between <box> and </box>. You MUST strictly follow the format."
)
ZOOMBENCH_SYSTEM = (
    "You are a helpful assistant.\n The assistant first thinks about the reasoning process in the mind and then "
    "provides the user with the answer. The answer are enclosed within <answer> </answer> tags, respectively, i.e., "
    "reasoning process here <answer> answer here </answer>"
)

_VSTAR_END = "\nAnswer with the option's letter from the given choices directly."
_TREEBENCH_END = (
    "\nSelect the best answer to the above multiple-choice question based on the image. After the reasoning process, "
    "respond with only the letter of the correct option between <answer> and </answer>."
)
_MME = (
    "{stem} The choices are listed below:{gap}\n{options}\nSelect the best answer to the above multiple-choice "
    "question based on the image. Respond with only the letter (A, B, C, D, or E) of the correct option.{end}"
)
_SHORT_END = "\nAnswer the question using a single word or phrase."


# --- Questions of choice ----------------------------------------------------------------------------------------------


def our_choice(question: BenchmarkQuestion) -> str:
    """Ours: the options in their order, one a line, and the letter asked for; an open question as it is."""
    choice = question.choice
    if choice is None:
        return question.sample.question
    shown = choice.stem if choice.is_fixed else f"{choice.stem}\n{_lines(choice, '{letter}. {option}')}"
    return f"{shown}\nAnswer with the letter of the right option."


def vstar(question: BenchmarkQuestion) -> str:
    """V* as its list of questions has it, which the folder form is put like."""
    return question.text or f"{_stem(question)}\n{_options(question, '({letter}) {option}')}{_VSTAR_END}"


def lmms_vstar(question: BenchmarkQuestion) -> str:
    """lmms-eval takes the options out of V*'s text and writes them anew; the sentence that ends the text goes with the
    last of them, and comes a second time."""
    text = vstar(question)
    options = re.findall(r"\([A-D]\)\s*([^()]+?)(?=\s*\([A-D]\)|$)", text)
    if options:
        lines = [f"{letter}. {option.strip()}" for letter, option in zip("ABCD", options, strict=False)]
        text = "\n".join([text.split("(A)")[0].strip(), *lines])
    return text + _VSTAR_END


def vlmevalkit_choice(question: BenchmarkQuestion) -> str:
    """VLMEvalKit's prompt of every question of choice."""
    options = _options(question, "{letter}. {option}")
    return (
        f"Question: {_stem(question)}\nOptions:\n{options}\nPlease select the correct answer from the options above. \n"
    )


def lmms_hrbench(question: BenchmarkQuestion) -> str:
    """lmms-eval on HR-Bench."""
    return f"{_stem(question).strip()}\n{_options(question, '{letter}. {option}')}\nAnswer the option letter directly."


def mme_realworld(question: BenchmarkQuestion) -> str:
    """MME-RealWorld as its authors' script asks (evaluation/model_vqa_mme_real_world.py)."""
    return _mme(question, gap=" ", end="\nThe best answer is:")


def vlmevalkit_mme_realworld(question: BenchmarkQuestion) -> str:
    """VLMEvalKit on MME-RealWorld: the spaces at the ends of two lines are elsewhere."""
    return _mme(question, gap="", end=" \nThe best answer is:")


def lmms_mme_realworld(question: BenchmarkQuestion) -> str:
    """lmms-eval on MME-RealWorld: a space after the last colon."""
    return _mme(question, gap="", end="\nThe best answer is: ")


def _mme(question: BenchmarkQuestion, gap: str, end: str) -> str:
    return _MME.format(stem=_stem(question), options=_options(question, "({letter}) {option}"), gap=gap, end=end)


def treebench(question: BenchmarkQuestion) -> str:
    """TreeBench as its script asks. It leaves the options out for a category "OCR", and its own is "Perception/OCR"."""
    if question.sample.source == "OCR":
        return f"{question.sample.question}{_TREEBENCH_END}"
    return f"{question.sample.question} Options:\n{question.text or ''}{_TREEBENCH_END}"


def vlmevalkit_treebench(question: BenchmarkQuestion) -> str:
    """VLMEvalKit on TreeBench, where the questions of "Perception/OCR" hold their options already."""
    own = question.sample.source == "Perception/OCR"
    options = "" if own else f"\nOptions:\n{question.text or ''}"
    return f"{question.sample.question}{options}\nAnswer with the correct option's letter directly."


# --- Open questions ---------------------------------------------------------------------------------------------------


def as_distributed(question: BenchmarkQuestion) -> str:
    """The wording of the file, whole."""
    return question.text or question.sample.question


def visualprobe(question: BenchmarkQuestion) -> str:
    """VisualProbe: a line break between the picture and the question."""
    return f"\n{question.sample.question}"


def short_answer(question: BenchmarkQuestion) -> str:
    """Both toolkits on documents, charts and texts in pictures."""
    return question.sample.question + _SHORT_END


def lmms_textvqa(question: BenchmarkQuestion) -> str:
    """lmms-eval on TextVQA puts a capital first and everything else in lower case, names and abbreviations too."""
    return question.sample.question.capitalize() + _SHORT_END


def lmms_chartqa(question: BenchmarkQuestion) -> str:
    """lmms-eval on ChartQA."""
    return f"{question.sample.question}\nAnswer the question with a single word."


# --- Parts ------------------------------------------------------------------------------------------------------------


def _stem(question: BenchmarkQuestion) -> str:
    return question.choice.stem if question.choice else question.sample.question


def _options(question: BenchmarkQuestion, form: str) -> str:
    return _lines(question.choice, form) if question.choice else ""


def _lines(choice: ChoiceQuestion, form: str) -> str:
    return "\n".join(form.format(letter=letter, option=option) for letter, option in choice.letters.items())
