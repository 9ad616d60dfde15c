"""Every published rule that says whether a reply is right, to the letter and with its faults, by its source.

A rule takes the whole reply, the options as the model was shown them (letter → text; none where the question is open)
and the truth (a letter, or the answer itself where there are no options). It gives 1 or 0, and None where it would ask
a judge: nobody was asked here, so nobody knows. `rewards.choices` reads letters strictly; that is ours. The rules of
toolkits are in toolkit_rules.py, those over several reference answers in vqa_rules.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from visrl.box import Corners
from visrl.evaluate import toolkit_rules
from visrl.replies import spoken
from visrl.rewards.choices import read_choice
from visrl.rewards.detection import corner_iou
from visrl.zoom.calls import answer_of, boxes_in_text

Options = Mapping[str, str]
Score = Callable[[str, Options, str], float | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule on replies: how it scores one, where it was published, and whether it asks a judge where it cannot."""

    score: Score
    source: str
    asks_judge: bool = False


# --- Ours -------------------------------------------------------------------------------------------------------------


def strict(reply: str, options: Options, truth: str) -> float:
    """1 where the reply plainly names the letter `truth`; what cannot be read is wrong (see `rewards.choices`)."""
    return float(read_choice(spoken(reply), options) == truth)


# --- Those of authors -------------------------------------------------------------------------------------------------


def deepeyes(reply: str, options: Options, truth: str) -> float | None:
    """DeepEyes on V*: a lone letter, a letter with a full stop, or `A. ` and the option's text; else its judge.

    What stands in the first `<answer>` is read, and the first `\\boxed{…}` in it. A `\\boxed` without a brace stops
    the published script: 0 here.
    """
    said = reply
    if "<answer>" in reply and "</answer>" in reply:
        said = reply.split("<answer>")[1].split("</answer>")[0].strip()
    if "\\boxed" in said:
        pieces = said.split("\\boxed{")
        if len(pieces) < 2:
            return 0.0
        said = pieces[1].split("}")[0]
    if len(said) == 1:
        return float(said == truth)
    if len(said) == 2 and "." in said:
        return float(truth in said)
    return 1.0 if f"{truth}. {options.get(truth, '')}" in said else None


def hrbench(reply: str, options: Options, truth: str) -> None:
    """HR-Bench: every reply goes to a language model that says yes or no."""
    return None


# Two commas are missing in the published list: the third and the fourth pair are one prefix each.
MME_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
)


def mme_realworld(reply: str, options: Options, truth: str) -> float:
    """MME-RealWorld: the first capital A to E anywhere, after some phrases are taken out. "Because" is B, "Best answer:
    C" is B, and an empty reply is the first option."""
    choices = [f"({letter}) {text}" for letter, text in options.items()]
    return float(toolkit_rules.first_capital(reply, MME_PREFIXES, choices) == truth)


def treebench(reply: str, options: Options, truth: str) -> float:
    """TreeBench: what the first `<answer>` holds is the letter, in either case; without it, the whole reply is."""
    said = answer_of(reply)
    return float((reply if said is None else said).upper() == truth.upper())


def treebench_iou(reply: str, truths: Sequence[Corners]) -> float:
    """TreeBench's mIoU of one question: over its true boxes, the mean of the best IoU of any box in the reply.

    Boxes too many cost nothing, and the reply's pixels, of the picture as the model saw it, are compared with those of
    the file as they are. 0 without true boxes.
    """
    boxes = boxes_in_text(reply)
    if not truths:
        return 0.0
    return sum(max((corner_iou(box, truth) for box in boxes), default=0.0) for truth in truths) / len(truths)


def zoombench(reply: str, options: Options, truth: str) -> float | None:
    """ZoomBench: right where the extracted answer is the truth, letter case and outer spaces aside; else its judge.

    The published exact check also knows algebra (mathruler); what only that would call equal goes to the judge here.
    """
    return 1.0 if _same(zoom_answer(reply), truth) else None


def zoom_choice(reply: str, options: Options, truth: str) -> float | None:
    """How Zooming without Zooming scores V*, HR-Bench and MME-RealWorld: `zoombench`, then letters, then its judge.

    Of the reply the first "(X)" counts, else the first capital before a full stop, a bracket or a space, else the first
    capital: "The red one" is T, "It is B" is B for want of anything after I.
    """
    said = zoom_answer(reply)
    meant = _ZOOM_TRUTH.match(truth.strip())
    first = next((found[1] for pattern in _ZOOM_FIRST if (found := pattern.search(said))), None)
    return 1.0 if _same(said, truth) or (meant and first == meant[1]) else None


_ZOOM_TRUTH = re.compile(r"[ (\[]*([A-F])(?:(?=$)|[.)\]]|(?:[:-]\s+))")
_ZOOM_FIRST = (re.compile(r"\(([A-Z])\)"), re.compile(r"([A-Z])[.)\s]"), re.compile(r"([A-Z])"))


def zoom_answer(reply: str) -> str:
    """What ZoomBench's scorer takes for the answer: between `<answer>` tags, from "Answer:" on, or the last three
    lines. An `<answer>` that is never closed loses the last character of the reply."""
    if "<answer>" in reply:
        start, end = reply.find("<answer>"), reply.find("</answer>")
        return reply[start:end].replace("<answer>", "").replace("</answer>", "")
    if "Answer:" in reply:
        return reply[reply.find("Answer:") :]
    return "\n".join(reply.split("\n")[-3:])


def _same(said: str, truth: str) -> bool:
    return said.strip().lower() == truth.strip().lower()


def visualprobe(reply: str, options: Options, truth: str) -> float | None:
    """VisualProbe (Mini-o3): wrong without an `<answer>`, and whatever one holds goes to its judge."""
    return None if answer_of(reply) is not None else 0.0


# --- The table --------------------------------------------------------------------------------------------------------

RULES: dict[str, Rule] = {
    "strict": Rule(strict, "visrl"),
    "deepeyes": Rule(deepeyes, "DeepEyes, eval/judge_result.py at cc3ff4d", asks_judge=True),
    "hrbench": Rule(hrbench, "HR-Bench, the authors' judge", asks_judge=True),
    "mme-realworld": Rule(mme_realworld, "MME-RealWorld, evaluation/eval_your_results.py"),
    "treebench": Rule(treebench, "TreeVGR, inference_treebench.py at 4823ad8"),
    "zoombench": Rule(zoombench, "Zooming-without-Zooming, mm-eval/judge_qwenlm.py at fdc0ba1", asks_judge=True),
    "zoom-choice": Rule(zoom_choice, "Zooming-without-Zooming, mm-eval/judge_qwenlm.py at fdc0ba1", asks_judge=True),
    "visualprobe": Rule(visualprobe, "Mini-o3, verl/utils/reward_score/general_qa_tool.py at 8654dbf", asks_judge=True),
    "vlmevalkit": Rule(toolkit_rules.vlmevalkit, "VLMEvalKit, vlmeval/utils/matching_util.py at e8e78f05", True),
    "vlmevalkit-letter": Rule(
        toolkit_rules.vlmevalkit_letter, "VLMEvalKit, vlmeval/dataset/utils/multiple_choice.py at e8e78f05"
    ),
    "lmms-eval-vstar": Rule(toolkit_rules.lmms_vstar, "lmms-eval, tasks/vstar_bench/utils.py at 75571cfe"),
    "lmms-eval-hrbench": Rule(
        toolkit_rules.lmms_hrbench, "lmms-eval, tasks/hrbench/hrbench_evals.py at 75571cfe", asks_judge=True
    ),
    "lmms-eval-mme-realworld": Rule(
        toolkit_rules.lmms_mme_realworld, "lmms-eval, tasks/mme_realworld/utils.py at 75571cfe"
    ),
}
