"""Every prompt and critic rubric, once. Two protocols: `visrl` (training, generation, serving) and `viscot` (scores).

Nothing here knows about models: `<image>` marks the place of an image, in the order of the images given.
"""

from __future__ import annotations

IMAGE = "<image>"


def without_marks(text: str) -> str:
    """`text`, which a model may have written, with a space for every mark of an image. Nothing in its place would let
    what stands around it close up to another mark.

    >>> without_marks("<ima<image>ge>")
    '<ima ge>'
    """
    return text.replace(IMAGE, " ")


# REFERENCE: the sentences of Visual-CoT (box only) and of VisRL (box, then the sub-image).
BOX_SENTENCE = "Please provide the bounding box coordinate of the region that can help you answer the question better."
FOCUS_SENTENCE = (
    "Please first provide the bounding box coordinate of the region, "
    "then refer to the corresponding sub-image to answer the question better."
)


def focus_prompt(question: str) -> str:
    """Step 1 of the `visrl` protocol: one image, the model answers with a box."""
    return f"{IMAGE}\n{question} {FOCUS_SENTENCE}"


def answer_prompt(question: str) -> str:
    """Step 2 of the `visrl` protocol: image and crop in one user turn, the model answers the question."""
    return looks_prompt(question, 1)


def looks_prompt(question: str, crops: int) -> str:
    """A turn of the `visrl` protocol after so many looks: the image, and after the question a line for each crop."""
    return focus_prompt(question) + f"\n{IMAGE}" * crops


# --- The critic of self-evolution: a model that knows the reference answer, never a true box --------------------------

_SCORE_FORM = (
    "1 is the best score and 0 the worst; use the numbers between for what is partly so. "
    'Reply with JSON alone, like {"score": 0.8}.'
)


def critic_box_prompt(question: str, reference: str) -> str:
    """Whether a crop, the one image shown, holds what the reference answer needs."""
    return (
        f"{IMAGE}\nThis picture is a part that was cut out of a larger one, to answer a question about it.\n"
        f"Question: {question}\nCorrect answer: {reference}\n"
        "Judge the part, not the question: can everything that the correct answer rests on be seen in it, large enough "
        "to make out? A part that misses it scores 0, one that shows it cut off or far too small scores low. "
        f"{_SCORE_FORM}"
    )


def critic_answer_prompt(question: str, reference: str, answer: str) -> str:
    """Whether an answer about the whole image says what the reference answer says."""
    return (
        f"{IMAGE}\nSomebody answered a question about this picture.\n"
        f"Question: {question}\nCorrect answer: {reference}\nTheir answer: {answer}\n"
        "Judge whether their answer says the same as the correct one; other words for the same thing are as good. "
        f"{_SCORE_FORM}"
    )


# --- The published scores' protocol, `viscot` (Visual-CoT; its line breaks and letter case are part of it) ------------

JUDGE_TOKENS = 256  # room for a judge that explains itself (one that thinks aloud needs some thousand); published: none
_QUESTION_ENDS = " Please provide the bounding box"

JUDGE_SYSTEM = (
    "\nYou are responsible for proofreading the answers, you need to give a score to the model's answer by referring "
    "to the standard answer, based on the given question. The full score is 1 point and the minimum score is 0 points. "
    'Please output the score in the form "score: <score>". The evaluation criteria require that the closer the '
    "model's answer is to the standard answer, the higher the score.\n"
)


def viscot_box_prompt(question: str) -> str:
    """Step 1 of the `viscot` protocol: the question in lower case and with a full stop after it."""
    return f"{IMAGE}\n{question.lower()}. {BOX_SENTENCE}"


def viscot_answer_prompt(question: str) -> str:
    """The third turn of the `viscot` protocol, after `<image>\\n` + question and the box text."""
    return f"{IMAGE}\nPlease answer the question based on the original image and local detail image.{question}"


def judged_question(first_turn: str) -> str:
    """What the judge is shown of a benchmark row's first turn: its `<image>` mark stays, the box sentence goes."""
    return first_turn.split(_QUESTION_ENDS)[0]


def judge_prompt(question: str, reference: str, prediction: str) -> str:
    """The judge's user turn; `question` as `judged_question` gives it."""
    return f"\nquestion: {question}\nstandard answer: {reference}\nmodel's answer: {prediction}\n"


def refcoco_prompt(expression: str) -> str:
    """RefCOCO as Visual-CoT's scripts ask it: the expression in lower case, a box for an answer."""
    return (
        f"{IMAGE}\nLocate the region this sentence describes: {expression.lower()}. "
        "Please provide the bounding box coordinates."
    )
