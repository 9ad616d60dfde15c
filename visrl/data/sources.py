"""Where samples and preferences come from, by one string: drawn scenes, a named data set, or a file of ours.

`scenes:POOL/START+COUNT` names drawn scenes (`scenes:preference/0+2000`), `scenes:POOL@TAGS:KIND,KIND/START+COUNT`
those of at most TAGS tags with questions of these kinds alone, either part left out where it does not matter; a name in
`dataset_dir/dataset_info.json` is that data set; a parquet file, or a folder that `datasets` saved, is read by its
columns; anything else is a path to JSONL records.
"""

from __future__ import annotations

import re
import shlex
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast, get_args

from visrl.data.convert import Reading, other_format
from visrl.data.hf import is_hf
from visrl.data.info import find_entry
from visrl.data.named import check_names, hf_samples, is_named, named_preferences, named_samples
from visrl.data.native import parse_own
from visrl.data.rows import DataRow, format_notes, read_rows
from visrl.data.sizes import Sizes
from visrl.manifest import hash_files
from visrl.records import Preference, RecordError, Sample, VisrlWarning
from visrl.scenes import KINDS, MAX_TAGS, POOLS, Kind, scene_samples

_SCENES = re.compile(
    r"scenes:(?P<pool>\w+?)(@(?P<tags>[1-4]))?(:(?P<kinds>\w+(,\w+)*))?/(?P<start>\d+)\+(?P<count>\d+)"
)


Kept = TypeVar("Kept", Sample, Preference)


def read_samples(
    spec: str, *, with_box: bool = False, dataset_dir: str = "data", image_root: str | None = None
) -> list[Sample]:
    """The samples that `spec` names; drawn ones hold their true box only where it is asked for. Rows of one id are told
    apart by their `repeat`.

    Raises:
        RecordError: no such pool or file, or a row that is no sample.
    """
    if spec.startswith("scenes:"):
        return _drawn_samples(spec, with_box)
    if is_named(spec, dataset_dir):
        return number_repeats(named_samples(spec, dataset_dir, image_root))
    if is_hf(spec):
        return number_repeats(hf_samples(spec, image_root))
    if not Path(spec).is_file():
        check_names(spec, dataset_dir)
        raise RecordError(
            f"no data {spec!r}: give a JSONL or parquet file of samples, a name in {dataset_dir}/dataset_info.json, "
            "or scenes:POOL/START+COUNT"
        )
    return number_repeats(_own_records(Sample, spec, image_root))


def _drawn_samples(spec: str, with_box: bool) -> list[Sample]:
    match = _SCENES.fullmatch(spec)
    if match:
        if match["pool"] not in POOLS:
            raise RecordError(f"no pool {match['pool']!r} of drawn scenes; there are {', '.join(POOLS)}")
        kinds = tuple(match["kinds"].split(",")) if match["kinds"] else KINDS
        if unknown := sorted(set(kinds) - set(get_args(Kind))):
            known = ", ".join(get_args(Kind))
            raise RecordError(f"no questions of kind {unknown[0]!r} in drawn scenes; there are {known}")
        return scene_samples(
            match["pool"],
            int(match["start"]),
            int(match["count"]),
            kinds=cast("tuple[Kind, ...]", kinds),
            with_box=with_box,
            max_tags=int(match["tags"] or MAX_TAGS),
        )
    raise RecordError(f"{spec!r} must be of the form scenes:POOL/START+COUNT")


def number_repeats(samples: list[Sample]) -> list[Sample]:
    """The samples of a data set, in its order, those of one id numbered: an id is its user's, and may stand for several
    rows."""
    seen: dict[str, int] = {}
    for place, sample in enumerate(samples):
        repeat = seen.get(sample.id, 0)
        if repeat:
            samples[place] = replace(sample, repeat=repeat)
        seen[sample.id] = repeat + 1
    return samples


def read_preferences(spec: str, *, dataset_dir: str = "data", image_root: str | None = None) -> list[Preference]:
    """The preferences of a named data set or a JSONL file.

    Raises:
        RecordError: no such file, or a row that is no preference.
    """
    if is_named(spec, dataset_dir):
        return named_preferences(spec, dataset_dir, image_root)
    if is_hf(spec):
        raise RecordError(
            f"{spec} is parquet, which holds samples; preferences are read as JSONL or as a named data set"
        )
    if not Path(spec).is_file():
        check_names(spec, dataset_dir)
        raise RecordError(
            f"no data {spec!r}: give the preferences.jsonl of `visrl filter`, or a name in "
            f"{dataset_dir}/dataset_info.json"
        )
    return _own_records(Preference, spec, image_root)


def _own_records(kind: type[Kept], path: str, image_root: str | None) -> list[Kept]:
    """The records of a file of ours, by the reader of `visrl data check`: what it calls good is taken.

    Raises:
        RecordError: rows that it calls bad, or of the other kind; the first is named, and how many there are.
    """
    records: list[Kept] = []
    first, bad = "", 0
    sizes = Sizes(images=image_root or ".")
    notes = Counter[str]()
    for row in read_rows(path, lambda raw, number: parse_own(raw, number, sizes)):
        notes.update(row.notes)
        fault = row.reason
        for record in row.records:
            if isinstance(record, kind):
                records.append(record)
            else:
                fault = f"it is a {type(record).__name__}, and {kind.__name__}s are wanted here"
        if fault:
            first = first or f"{path}, row {row.number}: not a {kind.__name__}: {fault}{_hint(row, path)}"
            bad += 1
    if bad:
        lists = f"`visrl data check --from visrl {shlex.quote(path)}` counts them all"
        raise RecordError(f"{first}; so are {bad - 1:,} more ({lists})" if bad > 1 else first)
    for line in format_notes(notes):
        warnings.warn(f"{path}: {line}", VisrlWarning, stacklevel=3)
    return records


def _hint(row: DataRow, path: str) -> str:
    """What to do with a file whose first bad row is understood under another format."""
    other = other_format(row.raw, "visrl", path, Reading()) if row.fault else None
    if other is None:
        return ""
    name = ", or name it in dataset_info.json" if other == "sharegpt" else ""
    command = f"visrl data convert --from {other} --to visrl {shlex.quote(path)} OUT.jsonl"
    return f"; it has the keys of {other}: `{command}`{name}"


def hash_source(spec: str, dataset_dir: str = "data") -> str:
    """One short hash over the files that `spec` names; what names no files (drawn scenes, a file that is not there)
    stands for itself."""
    if spec.startswith("scenes:"):
        return spec
    if is_named(spec, dataset_dir):
        files = [find_entry(dataset_dir, part.strip()).path for part in spec.split(",")]
    else:
        files = [Path(spec)]
    known = all(file.is_file() or is_hf(file) for file in files)
    return hash_files(*files) if known else spec
