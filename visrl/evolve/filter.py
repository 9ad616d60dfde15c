"""`visrl filter`: a generated folder → preferences, what was dropped and why, a table against true boxes, a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
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
from visrl.evolve.turns import FilteredTurns, count_turns, make_turn_pairs, turn_lines
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
        `sampled_tokens_per_pair` (None: the generation did not count). Of several looks pairs are counted by kind and
        by the looks before them, and tries by their end (see `turns.count_turns`); they are set against no true box.

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
        **config.recorded(exclude={"output_dir", "input_dir", "pictures"}),
        **source,
        "input": hash_files(*(path for group in files for path in group)),
        "data": hash_source(source["dataset"], source["dataset_dir"]),
    }
    done = claim_folder(config.output_dir, identity)
    with_boxes = read_questions(**source, with_box=True)
    truth = {sample.place: sample.box for sample in with_boxes if sample.box is not None}
    # What becomes a preference has never seen a true box.
    samples = [replace(sample, box=None) for sample in with_boxes]
    tries = _all(Trajectory, files[0])
    first = next(tries, None)
    several = first is not None and first.end is not None
    _check_looks(config, several)
    given = samples, chain([first] if first else [], tries), _all(Verdict, files[1]), config.filter_settings()
    result = make_turn_pairs(*given) if several else make_pairs(*given)
    counts = count_turns(result) if isinstance(result, FilteredTurns) else count_pairs(result, truth)
    counts["sampled_tokens_per_pair"] = _tokens_per_pair(config.input_dir, len(result.pairs))
    if not done:
        write_records(config.output_dir / PREFERENCES, result.preferences)
        if config.pictures:
            _write_page(config, result, truth, source["image_root"])
        parents = {"input": identity["input"]}
        write_manifest(config.output_dir, verb="filter", config=identity, parents=parents, counts=counts)
    print("\n".join([*_lines(config, counts, several), *_cost_lines(counts)]))
    return counts


def _check_looks(config: FilterConfig, several: bool) -> None:
    """Refuse keys that mean nothing for the tries that there are.

    Raises:
        ConfigError: so it is.
    """
    if several and config.losers != "own":
        raise ConfigError(f"losers={config.losers}: turns of several looks lose to others of the policy's; set own")
    for key in ("look_price", "punish_unfinished"):
        if not several and getattr(config, key):
            raise ConfigError(f"{key}: these are tries of one look; leave it out")


def _write_page(
    config: FilterConfig, result: Filtered | FilteredTurns, truth: dict[Place, Box], root: str | None
) -> None:
    from visrl.evolve.pairs_page import write_page
    from visrl.evolve.turns_page import write_turns_page

    page = config.output_dir / PAGE
    if isinstance(result, FilteredTurns):
        write_turns_page(page, result, config.pictures, root)
    else:
        write_page(page, result, truth, config.pictures, root)


def _lines(config: FilterConfig, counts: dict[str, Any], several: bool) -> list[str]:
    """What came of a filter, as text."""
    reasons = ", ".join(f"{count} {name}" for name, count in counts["dropped_by_reason"].items()) or "none dropped"
    kept, asked = counts["kept"], counts["questions"]
    if several:
        first = f"{counts['pairs']} pairs of {kept} of {asked} questions ({reasons}) → {config.output_dir}"
        return [first, *turn_lines(counts, config.filter_settings())]
    lines = [f"{kept} pairs of {asked} questions ({reasons}) → {config.output_dir}"]
    other = counts["answer_pairs_of_another_crop"]
    lines.append(
        f"{counts['answer_pairs']} with a pair of answers" + (f", {other} over another own crop" if other else "")
    )
    if kept and not counts["answer_pairs"] and config.losers != "paper":
        lines.append("answers are compared over one crop: generate with answers=2 or more for pairs of them")
    return lines


def _cost_lines(counts: dict[str, Any]) -> list[str]:
    tokens, boxes = counts["sampled_tokens_per_pair"], counts.get("boxes")
    lines = [] if tokens is None else [f"{tokens:,} tokens sampled per pair"]
    return lines + (table_lines(boxes) if boxes else [])


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
