"""Scores of a run's checkpoints on held-out questions, and `summary.json`, which the report is made from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visrl.evolve.clock import StepClock
from visrl.manifest import package_versions, read_manifest
from visrl.records import Sample, write_text
from visrl.report.loop import ALONE, ONLINE

if TYPE_CHECKING:
    from visrl.evolve.generate import SamplingConfig
    from visrl.rollout.greedy import Mode


def evaluate_all(
    run: Path,
    samples: Sequence[Sample],
    checkpoints: dict[str, str],
    config: SamplingConfig,
    *,
    controls: bool,
    clock: StepClock,
) -> None:
    """Every checkpoint on the same held-out questions, looking as `config` has them look; the controls of the first and
    of the last of the iterations."""
    ends = _ends(list(checkpoints))
    own: list[Mode] = ["own"]
    if controls and config.looks_several_times:
        print("controls are left out: they put one box in the model's place, and it looks several times")
    bounds = _applicable_modes(samples) if controls and not config.looks_several_times else own
    for name, path in checkpoints.items():
        modes = bounds if name in ends else own
        clock.time(f"eval/{name}", partial(_evaluate, run, samples, name, path, modes, config))


def _ends(names: Sequence[str]) -> tuple[str, str]:
    """The first checkpoint and the last of the iterations, which online reinforcement stands beside."""
    loop = [name for name in names if name != ONLINE] or list(names)
    return loop[0], loop[-1]


def _applicable_modes(samples: Sequence[Sample]) -> list[Mode]:
    """The modes that these samples allow; those that they do not are said."""
    from visrl.rollout.controls import other_questions
    from visrl.rollout.greedy import CROP_MODES

    lacking: dict[Mode, str] = {}
    if not all(sample.box for sample in samples):
        lacking |= dict.fromkeys(("random", "center", "truth"), "a question without a true box")
    if not any(other_questions(samples)):
        lacking["other_question"] = "no image with two questions about different regions"
    for mode, why in lacking.items():
        print(f"control {mode} is left out: there is {why}")
    return [mode for mode in CROP_MODES if mode not in lacking]


def _evaluate(
    run: Path, samples: Sequence[Sample], name: str, path: str, modes: Sequence[Mode], config: SamplingConfig
) -> None:
    from visrl.engines.open import PolicyConfig, opened_policy
    from visrl.records import write_records
    from visrl.rewards.scored import evaluate_samples
    from visrl.rollout.protocols import protocol_of

    folder = run / "eval"
    files = {mode: folder / (f"{name}.jsonl" if mode == "own" else f"{name}.{mode}.jsonl") for mode in modes}
    if all(file.is_file() for file in files.values()):
        return
    looks = ("image_max_pixels", "crop_max_pixels", "box_codec", "trust_remote_code", "layout")
    here = PolicyConfig(model_name_or_path=path, **{key: getattr(config, key) for key in looks})
    with opened_policy(here) as opened:
        rule = config.crop_rule or opened.settings.crop_rule
        for mode, file in files.items():
            if not file.is_file():
                rows = evaluate_samples(
                    opened.policy, samples, mode=mode, protocol=protocol_of(config), crop_rule=rule,
                    root=config.image_root,
                )  # fmt: skip
                write_records(file, rows)
    print(f"evaluated {name} on {len(samples)} held-out questions ({', '.join(modes)})")


def write_summary(
    run: Path, names: Sequence[str], iterations: int, *, seed: int, clock: StepClock, config: dict[str, Any]
) -> dict[str, Any]:
    """Write `summary.json` from the files of the run; the summary. `names` are the checkpoints, `config` is shown."""
    summary: dict[str, Any] = {"seed": seed, "stages": [], "controls": {}, "controls_last": {}, "pairs": []}
    for name in names:
        if not (run / "eval" / f"{name}.jsonl").is_file():
            continue
        iteration, _, stage = name.rpartition("-")  # "sft", "online", or "iter0-stage1"
        entry: dict[str, Any] = {"name": stage, "iteration": int(iteration[4:] or 0) if iteration else 0}
        summary["stages"].append({**entry, **_stage_scores(run / "eval", name)})
    for key, name in zip(("controls", "controls_last"), _ends(names), strict=True):
        for file in sorted((run / "eval").glob(f"{name}.*.jsonl")):
            summary[key][file.name.split(".")[1]] = _scores(file)
    for number in range(iterations):
        filtered = read_manifest(run / f"iter{number}" / "filter") or {}
        generated = read_manifest(run / f"iter{number}" / "generate") or {}
        more = {"trajectories": generated.get("trajectories"), "counts": generated.get("counts")}
        summary["pairs"].append({"iteration": number, **filtered.get("counts", {}), **more})
    summary["seconds"] = round(sum(clock.seconds.values()), 1)
    summary["seconds_by_step"], summary["cpu_seconds_by_step"] = clock.seconds, clock.cpu_seconds
    summary["peak_rss_mb"] = json.loads((run / "peak_rss.json").read_text(encoding="utf-8"))["mb"]
    summary["versions"] = package_versions(("torch", "transformers", "peft"))
    summary["config"] = config
    write_text(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def _stage_scores(folder: Path, name: str) -> dict[str, Any]:
    """The scores of a checkpoint: by kind, grounded × right, and what its crops gain where it was asked without."""
    from visrl.records import read_jsonl
    from visrl.rewards.crop_effects import gain_and_harm, quadrants
    from visrl.rewards.results import summarise_kinds

    file, without = folder / f"{name}.jsonl", folder / f"{name}.no_crop.jsonl"
    rows = list(read_jsonl(file))
    found = {**_scores(file), "by_kind": summarise_kinds(rows), "quadrants": quadrants(rows)}
    return {**found, "crop": gain_and_harm(read_jsonl(without), rows)} if without.is_file() else found


def _scores(file: Path) -> dict[str, Any]:
    from visrl.records import read_jsonl
    from visrl.rewards.results import summarise_measures

    rows = list(read_jsonl(file))
    measures = summarise_measures(rows)
    skipped = sum(bool(row.get("skipped")) for row in rows)
    scores: dict[str, Any] = {"answer_accuracy": measures["answer_accuracy"], "n": len(rows) - skipped, **measures}
    if skipped:
        scores["skipped"] = skipped
    return scores


def format_scores(summary: dict[str, Any]) -> str:
    """The scores of every checkpoint, the controls and the costs, as text."""
    lines = []
    for stage in summary["stages"]:
        accuracy = stage["answer_accuracy"]
        name = stage["name"] if stage["name"] in ALONE else f"iteration {stage['iteration']} {stage['name']}"
        line = f"{name:20} answers {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        if "box_iou" in stage:
            line += f"   IoU {stage['box_iou']['mean']:.3f}   IoU > 0.5 {stage['box_accuracy_50']['mean']:.3f}"
        if "right_object" in stage:
            line += f"   right object {stage['right_object']['mean']:.3f}"
        lines.append(line)
    for key, name in (("controls", "sft"), ("controls_last", "last")):
        controls = ", ".join(f"{mode} {scores['answer_accuracy']['mean']:.3f}" for mode, scores in summary[key].items())
        if controls:
            lines.append(f"controls of {name}: {controls}")
    lines.append(f"{summary['seconds']:.0f} s, peak memory {summary['peak_rss_mb']:.0f} MB")
    return "\n".join(lines)
