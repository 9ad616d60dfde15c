"""Every prompt and critic rubric, once. Two protocols: `visrl` (training, generation, serving) and `viscot` (scores).

Nothing here knows about models: `<image>` marks the place of a picture, in the order of the pictures given.
"""

from __future__ import annotations

IMAGE = "<image>"

# REFERENCE: the sentences of Visual-CoT (box only) and of VisRL (box, then the sub-image).
BOX_SENTENCE = (
    "Please provide the bounding box coordinate of the region that can help you answer the question better."
)
FOCUS_SENTENCE = (
    "Please first provide the bounding box coordinate of the region, "
    "then refer to the corresponding sub-image to answer the question better."
)


def focus_prompt(question: str) -> str:
    """Step 1 of the `visrl` protocol: one picture, the model answers with a box."""
    return f"{IMAGE}\n{question} {FOCUS_SENTENCE}"


def answer_prompt(question: str) -> str:
    """Step 2 of the `visrl` protocol: picture and crop in one user turn, the model answers the question."""
    return f"{focus_prompt(question)}\n{IMAGE}"
