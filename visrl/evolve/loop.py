"""`visrl demo`: the whole loop on drawn scenes with the embedded model, step by step, each step resumable.

SFT checkpoint → [generate → filter → stage 1 → merge → stage 2 → merge] × iterations → evaluation → report.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from visrl.config import Config, ConfigError, build_config, read_yaml
from visrl.manifest import claim_folder, hash_files, package_versions, read_manifest, write_manifest

TINY_RL = Path(__file__).parents[2] / "configs" / "tiny" / "train_rl.yaml"


class DemoConfig(Config):
    """What `visrl demo` takes; the defaults are the demo."""

    model_name_or_path: str = ""  # "": the embedded model
    output_dir: Path = Path("runs/demo")
    iterations: int = Field(2, ge=1)
    questions: int = Field(1000, ge=1)  # preference questions drawn for each iteration
    test_questions: int = Field(1000, ge=1)
    tags: int = Field(1, ge=1, le=4)  # coloured tags in a scene, outlines aside; more is beyond the embedded model
    rounds: int = Field(5, ge=1)
    temperature: float = Field(1.0, gt=0)
    chosen_only: bool = False  # the honest control: same pairs and steps, fine-tuning on the chosen side alone
    controls: bool = True
    threads: int = Field(0, ge=0)  # CPU threads; 0: all
    seed: int = 0
    train: dict[str, Any] = Field(default_factory=dict)  # over configs/tiny/train_rl.yaml
    train_stage1: dict[str, Any] = Field(default_factory=dict)
    train_stage2: dict[str, Any] = Field(default_factory=dict)


def run_demo(config: DemoConfig) -> Path:
    """Run what is left of the demo; the path of its report.

    Raises:
        ManifestError: the output folder holds a demo of another config.
        ConfigError: no model to start from.
    """
    import torch

    from visrl.models.tiny import CHECKPOINT

    if config.threads:
        torch.set_num_threads(config.threads)
    run = config.output_dir
    start = Path(config.model_name_or_path) if config.model_name_or_path else CHECKPOINT
    if not (start / "config.json").is_file():
        raise ConfigError(f"model_name_or_path: no model at {start}")
    identity = config.model_dump(mode="json", exclude={"output_dir", "threads"})
    claim_folder(run, {**identity, "model": hash_files(*sorted(start.glob("*.safetensors")))})
    clock = StepClock(run / "seconds.json")
    with peak_memory(run / "peak_rss.json"):
        checkpoints = {"sft": start}
        current = start
        for iteration in range(config.iterations):
            current = _iterate(config, iteration, current, checkpoints, clock)
        _evaluate_all(config, checkpoints, clock)
    summary = summarise(config, checkpoints, clock)
    from visrl.report.page import write_report

    report = write_report(run)
    print(_told(summary))
    print(f"report: {report}")
    return report


def _iterate(config: DemoConfig, iteration: int, policy: Path, checkpoints: dict[str, Path], clock: StepClock) -> Path:
    """One iteration from `policy`; its merged stage-2 checkpoint."""
    from visrl.evolve.filter import FilterConfig, filter_pairs
    from visrl.evolve.generate import GenerateConfig, generate

    base = config.output_dir / f"iter{iteration}"
    # Every iteration asks new questions; runs of different seeds do, too.
    first = (config.seed * config.iterations + iteration) * config.questions
    dataset = f"scenes:preference@{config.tags}/{first}+{config.questions}"
    asked = GenerateConfig(
        model_name_or_path=str(policy),
        dataset=dataset,
        output_dir=base / "generate",
        rounds=config.rounds,
        temperature=config.temperature,
        seed=config.seed,
    )
    clock.time(f"iter{iteration}/generate", lambda: generate(asked))
    kept = FilterConfig(input_dir=(base / "generate",), dataset=dataset, output_dir=base / "filter")
    counts: dict[str, Any] = {}
    clock.time(f"iter{iteration}/filter", lambda: counts.update(filter_pairs(kept)))
    current = policy
    for stage in (1, 2):
        if not counts["kept"]:
            print(f"iteration {iteration}: no pair was kept, so stage {stage} is left out and the checkpoint stays")
            checkpoints[f"iter{iteration}-stage{stage}"] = current
            continue
        merged = base / f"stage{stage}-merged"
        clock.time(
            f"iter{iteration}/stage{stage}",
            lambda stage=stage, current=current, merged=merged: _train_and_merge(config, base, stage, current, merged),  # type: ignore[misc]
        )
        checkpoints[f"iter{iteration}-stage{stage}"] = current = merged
    return current


def _train_and_merge(config: DemoConfig, base: Path, stage: int, policy: Path, merged: Path) -> None:
    from visrl.train.config import TrainConfig
    from visrl.train.export import ExportConfig, export
    from visrl.train.run import train

    values = {
        **read_yaml(TINY_RL),
        **config.train,
        **(config.train_stage1 if stage == 1 else config.train_stage2),
        "model_name_or_path": str(policy),
        "dataset": str(base / "filter" / "preferences.jsonl"),
        "output_dir": str(base / f"stage{stage}"),
        "rl_stage": stage,
        "seed": config.seed,
    }
    if config.chosen_only:
        values["pref_loss"] = "sft"
        values["pref_ftx"] = 0.0
    train(build_config(TrainConfig, values, where=str(TINY_RL)))
    adapter = str(base / f"stage{stage}")
    export(
        ExportConfig(
            model_name_or_path=str(policy), adapter_name_or_path=adapter, export_dir=merged, export_dtype="float32"
        )
    )


# --- Evaluation and summary -----------------------------------------------------------------------------------------


def _evaluate_all(config: DemoConfig, checkpoints: dict[str, Path], clock: StepClock) -> None:
    """Every checkpoint on the same held-out scenes; the controls of the first and of the last."""
    from visrl.evaluate.rollouts import CROP_MODES

    first, last = next(iter(checkpoints)), list(checkpoints)[-1]
    for name, path in checkpoints.items():
        modes = CROP_MODES if config.controls and name in (first, last) else CROP_MODES[:1]
        clock.time(f"eval/{name}", lambda name=name, path=path, modes=modes: _evaluate(config, name, path, modes))  # type: ignore[misc]


def _evaluate(config: DemoConfig, name: str, path: Path, modes: tuple[Any, ...]) -> None:
    from visrl.engines.local import LocalEngine
    from visrl.evaluate.rollouts import evaluate_samples
    from visrl.records import write_records

    folder = config.output_dir / "eval"
    files = {mode: folder / (f"{name}.jsonl" if mode == "own" else f"{name}.{mode}.jsonl") for mode in modes}
    if all(file.is_file() for file in files.values()):
        return
    engine = LocalEngine.load(path)
    for mode, file in files.items():
        if not file.is_file():
            rows = evaluate_samples(
                engine, _test_samples(config), mode=mode, crop_rule=engine.encoder.settings.crop_rule
            )
            write_records(file, rows)
    print(f"evaluated {name} on {config.test_questions} held-out questions ({', '.join(modes)})")


def _test_samples(config: DemoConfig) -> list[Any]:
    from visrl.data.sources import read_samples

    first = config.seed * config.test_questions
    return read_samples(f"scenes:test@{config.tags}/{first}+{config.test_questions}", with_box=True)


def summarise(config: DemoConfig, checkpoints: dict[str, Path], clock: StepClock) -> dict[str, Any]:
    """Write `summary.json` from the files of the run; the summary."""
    run = config.output_dir
    names = list(checkpoints)
    summary: dict[str, Any] = {"seed": config.seed, "stages": [], "controls": {}, "controls_last": {}, "pairs": []}
    for name in names:
        iteration, _, stage = name.rpartition("-")
        entry: dict[str, Any] = {"name": stage, "iteration": int(iteration[4:] or 0) if iteration else 0}
        summary["stages"].append({**entry, **_scores(run / "eval" / f"{name}.jsonl", by_kind=True)})
    for key, name in (("controls", names[0]), ("controls_last", names[-1])):
        for file in sorted((run / "eval").glob(f"{name}.*.jsonl")):
            summary[key][file.name.split(".")[1]] = _scores(file)
    for number in range(config.iterations):
        filtered = read_manifest(run / f"iter{number}" / "filter") or {}
        generated = read_manifest(run / f"iter{number}" / "generate") or {}
        more = {"trajectories": generated.get("trajectories"), "counts": generated.get("counts")}
        summary["pairs"].append({"iteration": number, **filtered.get("counts", {}), **more})
    summary["seconds"] = round(sum(clock.seconds.values()), 1)
    summary["seconds_by_step"] = clock.seconds
    summary["peak_rss_mb"] = json.loads((run / "peak_rss.json").read_text(encoding="utf-8"))["mb"]
    summary["versions"] = package_versions(("torch", "transformers", "peft"))
    summary["config"] = config.model_dump(mode="json")
    part = run / "summary.json.part"
    part.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    os.replace(part, run / "summary.json")
    write_manifest(run, verb="demo", config=summary["config"], parents={}, seconds=summary["seconds"])
    return summary


def _scores(file: Path, by_kind: bool = False) -> dict[str, Any]:
    from visrl.evaluate.statistics import interval
    from visrl.records import read_jsonl

    rows = list(read_jsonl(file))
    scores: dict[str, Any] = {
        "answer_accuracy": interval([float(row["correct"]) for row in rows]),
        "box_iou": interval([row["iou"] for row in rows]),
        "box_accuracy_50": interval([float(row["iou"] > 0.5) for row in rows]),
        "n": len(rows),
    }
    if by_kind:
        scores["by_kind"] = {}
        for kind in sorted({row["kind"] for row in rows}):
            own = [row for row in rows if row["kind"] == kind]
            scores["by_kind"][kind] = {
                "answer_accuracy": sum(row["correct"] for row in own) / len(own),
                "box_iou": sum(row["iou"] for row in own) / len(own),
                "n": len(own),
            }
    return scores


def _told(summary: dict[str, Any]) -> str:
    lines = []
    for stage in summary["stages"]:
        accuracy, overlap = stage["answer_accuracy"], stage["box_iou"]
        name = stage["name"] if stage["name"] == "sft" else f"iteration {stage['iteration']} {stage['name']}"
        lines.append(
            f"{name:20} answers {accuracy['mean']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]   "
            f"IoU {overlap['mean']:.3f}   IoU > 0.5 {stage['box_accuracy_50']['mean']:.3f}"
        )
    for key, name in (("controls", "sft"), ("controls_last", "last")):
        told = ", ".join(f"{mode} {scores['answer_accuracy']['mean']:.3f}" for mode, scores in summary[key].items())
        if told:
            lines.append(f"controls of {name}: {told}")
    lines.append(f"{summary['seconds']:.0f} s, peak memory {summary['peak_rss_mb']:.0f} MB")
    return "\n".join(lines)


class StepClock:
    """Seconds of each step, kept on disk, so that a resumed run knows what its finished steps took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def time(self, step: str, work: Callable[[], Any]) -> None:
        """Do `work` (which skips what is complete) and add its seconds to those of `step`."""
        print(f"== {step}", flush=True)
        started = time.monotonic()
        try:
            work()
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0.0) + time.monotonic() - started, 1)
            self.path.write_text(json.dumps(self.seconds, indent=1), encoding="utf-8")


@contextmanager
def peak_memory(path: Path) -> Any:
    """Watch this process's resident memory and write its peak, in MB, together with that of earlier tries."""
    stop = threading.Event()
    peak = json.loads(path.read_text(encoding="utf-8"))["mb"] if path.is_file() else 0.0
    process = psutil.Process()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.5):
            peak = max(peak, process.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.write_text(json.dumps({"mb": round(max(peak, process.memory_info().rss / 1e6), 1)}), encoding="utf-8")
