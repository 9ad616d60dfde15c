"""Make the demo data sets of this folder from drawn scenes: `python data/make_demo.py`. Same files at every run.

`demo_sft_data.json` holds both rounds of the warm-up, `demo_rl_data.json` step-level preferences; `dataset_info.json`
names them as users of the reference expect. Pictures are named `scene:POOL/INDEX` and drawn when they are opened.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from visrl.codecs import CODECS
from visrl.data.info import INFO
from visrl.data.rows import Writer
from visrl.data.sharegpt_write import entry_json, ranking_row, sft1_row, sft2_row
from visrl.prompts import answer_prompt, focus_prompt
from visrl.records import Picture, Preference, Sample
from visrl.scenes import scene_samples

HERE = Path(__file__).parent
SCENES = 12  # of two questions each, about different tags
CODEC, UNIT = CODECS["visrl"], (1, 1)  # three decimals of the image: no size matters


def main() -> None:
    warm_up = scene_samples("train", 0, SCENES, per_scene=2, with_box=True)
    with Writer(HERE / "demo_sft_data.json") as out:
        for sample in warm_up:
            out.write(sft1_row(sample, "image", None))
            out.write(sft2_row(sample, None))
    with Writer(HERE / "demo_rl_data.json") as out:
        for row in rankings(scene_samples("preference", 0, SCENES, per_scene=2, with_box=True)):
            out.write(row)
    steps = ("chosen", "rejected", "chosen_step", "rejected_step")
    info = {
        "demo_sft_data": entry_json("demo_sft_data.json"),
        "demo_rl_data_stage1": entry_json("demo_rl_data.json", ranking=steps, stage=1),
        "demo_rl_data_stage2": entry_json("demo_rl_data.json", ranking=steps, stage=2),
    }
    (HERE / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def rankings(samples: list[Sample]) -> list[dict[str, Any]]:
    """One ranking row per sample: the true box over that of another question of the same picture, the true answer over
    another question's."""
    rng = random.Random(88)
    answers = sorted({sample.answer for sample in samples})
    rows = []
    for sample in samples:
        (other,) = (one for one in samples if one.image == sample.image and one is not sample)
        assert sample.box is not None
        assert other.box is not None
        chosen = CODEC.format(sample.box, UNIT, UNIT)
        box = CODEC.parse(chosen, UNIT, UNIT)
        rejected = CODEC.format(other.box, UNIT, UNIT)
        wrong = rng.choice([answer for answer in answers if answer != sample.answer])
        whole = Picture(sample.image)
        rows.append(
            ranking_row(
                [
                    Preference(sample.id, "box", focus_prompt(sample.question), (whole,), chosen, rejected),
                    Preference(
                        sample.id, "answer", answer_prompt(sample.question), (whole, Picture(sample.image, box)),
                        sample.answer, wrong,
                    ),
                ]
            )
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
