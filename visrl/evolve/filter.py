"""`visrl filter`: a generated folder → preferences, what was dropped and why, a table against true boxes, a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visrl.box import Box, iou
from visrl.config import ConfigError, as_config
from visrl.data.native import read_records
from visrl.data.sources import hash_source
from visrl.evolve.config import FilterConfig
from visrl.evolve.generate import TRAJECTORIES, VERDICTS, read_questions
from visrl.evolve.losers import Judged
from visrl.evolve.pairs import Filtered, Pair, make_pairs
from visrl.evolve.tokens import add_tokens, all_sampled
from visrl.manifest import claim_folder, hash_files, hold, read_manifest, write_manifest
from visrl.records import Place, Record, RecordError, Trajectory, Verdict, write_records

PREFERENCES, PAGE = "preferences.jsonl", "pairs.html"
GOOD_IOU = 0.5  # the paper's table calls a box positive above this IoU with the true one
# The paper's shares in percent (REFERENCE, "data-generation ablation"): winner and loser Positive or Negative.
PAPER_TABLE = {"WP-LP": 0.43, "WP-LN": 64.64, "WN-LP": 1.64, "WN-LN": 33.29}
KINDS = tuple(PAPER_TABLE)


def filter_pairs(config: FilterConfig | str | Path | None = None, /, **keys: Any) -> dict[str, Any]:
    """Keep the best and the worst trajectory of every question that has both, as preferences.

    `output_dir` gets `preferences.jsonl`, a page that shows some pairs, and a manifest.

    Args:
        config: a `FilterConfig`, the path of a YAML file of its keys, or nothing where `keys` say it all.
        keys: keys of `FilterConfig`, over what `config` says; an unknown one is refused with the nearest known one.

    Returns:
        Counts: `questions`, `kept`, `dropped_by_reason`, `answer_pairs` (and how many of them over another crop than
        the winner's), `boxes` (how winner and loser stand to the true box, where that is known; P is IoU > 0.5), and
        `sampled_tokens_per_pair` (None: the generation did not count).

    Raises:
        RecordError: files that are missing, unfinished or not of the data set.
        ConfigError: an unknown key, or no data set named, and none in a manifest.
        HeldError: another process writes the folder.
    """
    config = as_config(FilterConfig, config, keys)
    with hold(config.output_dir):
        return _filter_pairs(config)


def _filter_pairs(config: FilterConfig) -> dict[str, Any]:
    files = [[folder / name for folder in config.input_dir] for name in (TRAJECTORIES, VERDICTS)]
    for path in (path for group in files for path in group):
        if not path.is_file():
            raise RecordError(f"no {path}: input_dir must be a folder that `visrl generate` finished")
    source = _source(config)
    identity = {
        **config.model_dump(mode="json", exclude={"output_dir", "input_dir", "pictures"}),
        **source,
        "input": hash_files(*(path for group in files for path in group)),
        "data": hash_source(source["dataset"], source["dataset_dir"]),
    }
    done = claim_folder(config.output_dir, identity)
    with_boxes = read_questions(**source, with_box=True)
    truth = {sample.place: sample.box for sample in with_boxes if sample.box is not None}
    # What becomes a preference has never seen a true box.
    samples = [replace(sample, box=None) for sample in with_boxes]
    result = make_pairs(samples, _all(Trajectory, files[0]), _all(Verdict, files[1]), config.filter_settings())
    counts = {**count_pairs(result, truth), "sampled_tokens_per_pair": _tokens_per_pair(config.input_dir, result.kept)}
    if not done:
        write_records(config.output_dir / PREFERENCES, result.preferences)
        if config.pictures:
            from visrl.evolve.pairs_page import write_page

            write_page(config.output_dir / PAGE, result, truth, config.pictures, source["image_root"])
        parents = {"input": identity["input"]}
        write_manifest(config.output_dir, verb="filter", config=identity, parents=parents, counts=counts)
    reasons = ", ".join(f"{count} {name}" for name, count in counts["dropped_by_reason"].items()) or "none dropped"
    print(f"{result.kept} pairs of {result.questions} questions ({reasons}) → {config.output_dir}")
    other = counts["answer_pairs_of_another_crop"]
    print(f"{counts['answer_pairs']} with a pair of answers" + (f", {other} over another own crop" if other else ""))
    if result.kept and not counts["answer_pairs"] and config.losers != "paper":
        print("answers are compared over one crop: generate with answers=2 or more for pairs of them")
    if counts["sampled_tokens_per_pair"] is not None:
        print(f"{counts['sampled_tokens_per_pair']:,} tokens sampled per pair")
    if counts["boxes"]:
        print("\n".join(table_lines(counts["boxes"])))
    return counts


def _tokens_per_pair(folders: Sequence[Path], pairs: int) -> float | None:
    """What was sampled for one pair: boxes, answers and a critic's replies; None where it is not known, or no pair."""
    sampled = all_sampled(add_tokens(read_manifest(folder) or {} for folder in folders))
    return round(sampled / pairs, 1) if sampled is not None and pairs else None


def count_pairs(result: Filtered, truth: dict[Place, Box]) -> dict[str, Any]:
    """Questions, kept pairs, drops by reason, and how the kept boxes stand to the true ones where those are known."""
    return {
        "questions": result.questions,
        "kept": result.kept,
        "dropped_by_reason": dict(sorted(result.dropped.items())),
        "answer_pairs": sum(pair.answers is not None for pair in result.pairs),
        "answer_pairs_of_another_crop": sum(
            pair.answers is not None and pair.answers.tried is not pair.winner[0] for pair in result.pairs
        ),
        "boxes": count_kinds(result.pairs, truth),
    }


def count_kinds(pairs: Sequence[Pair], truth: dict[Place, Box]) -> dict[str, int]:
    """How many pairs are WP-LP, WP-LN, WN-LP and WN-LN; empty where no true box of a pair is known."""
    known = [pair for pair in pairs if pair.sample.place in truth]
    counts = Counter(kind_of(pair, truth[pair.sample.place]) for pair in known)
    return {kind: counts[kind] for kind in KINDS} if known else {}


def kind_of(pair: Pair, truth: Box) -> str:
    """Whether winner (W) and loser (L) box have IoU > 0.5 with the true one: P yes, N no."""
    winner, loser = ("P" if _iou(judged, truth) > GOOD_IOU else "N" for judged in (pair.winner, pair.loser))
    return f"W{winner}-L{loser}"


def table_lines(kinds: dict[str, int]) -> list[str]:
    """The paper's table for these pairs, as text."""
    total = sum(kinds.values())
    lines = [f"winner and loser box against the true one (P: IoU > {GOOD_IOU}), of {total} pairs:"]
    for kind, count in kinds.items():
        lines.append(f"  {kind}  {count:6}  {100 * count / total:6.2f} %   (paper {PAPER_TABLE[kind]:.2f} %)")
    return lines


def _iou(judged: Judged, truth: Box) -> float:
    return iou(judged[0].box, truth) if judged[0].box is not None else 0.0


def _all(kind: type[Record], paths: Iterable[Path]) -> Iterator[Record]:
    for path in paths:
        yield from read_records(kind, path)


def _source(config: FilterConfig) -> dict[str, Any]:
    """What `read_questions` is to read: the data set of the config, else that of the generation."""
    if config.dataset is not None:
        said: Any = config.model_dump()
    else:
        manifest = read_manifest(config.input_dir[0])
        if manifest is None:
            raise ConfigError(
                f"dataset: say what {config.input_dir[0]} was generated from; it has no manifest that tells "
                "(was the generation finished?)"
            )
        said = manifest["config"]
    return {
        "dataset": said["dataset"],
        "dataset_dir": said["dataset_dir"],
        "skip": said["skip_samples"],
        "limit": said["max_samples"],
        "image_root": config.image_root or said["image_root"],
    }
