"""Where samples and preferences come from, by one string: drawn scenes, a named data set, or a file of ours.

`scenes:POOL/START+COUNT` names drawn scenes (`scenes:preference/0+2000`), a question of each; whole, it is
`scenes:POOL@TAGSxNUMBERS:KIND,KIND/START+COUNT*PER_SCENE`: COUNT scenes of at most TAGS tags with numbers of up to
NUMBERS digits, and of each up to PER_SCENE questions, of these kinds alone and about different tags first;
`scenes:POOL@looks…` are those that need no, one or two looks. A name in `dataset_dir/dataset_info.json` is that data
set; a parquet file, or a folder that `datasets` saved, is read by its columns; anything else is a path to JSONL
records.
"""

from __future__ import annotations

import os
import re
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from visrl.data.formats import Reading, find_format, other_format, read_entry
from visrl.data.hf import is_hf, read_hf
from visrl.data.info import check_names, find_entry, is_named
from visrl.data.native import parse_own
from visrl.data.rows import DataRow, format_notes, read_rows
from visrl.data.sizes import Sizes
from visrl.images import image_path, names_file
from visrl.manifest import hash_files
from visrl.plugins import is_plugin, plugin_file
from visrl.records import Preference, RecordError, Sample, VisrlWarning
from visrl.scenes import (
    KINDS,
    LEVEL,
    LOOK_KINDS,
    MAX_NUMBERS,
    MAX_TAGS,
    POOLS,
    check_kind,
    check_level,
    read_level,
    scene_samples,
)

_SCENES = re.compile(
    rf"scenes:{LEVEL}(:(?P<kinds>\w+(,\w+)*))?/(?P<start>\d{{1,15}})\+(?P<count>\d{{1,15}})(\*(?P<each>[1-9]\d{{0,2}}))?"
)


Kept = TypeVar("Kept", Sample, Preference)


def read_samples(
    spec: str, *, with_box: bool = False, dataset_dir: str = "data", image_root: str | None = None
) -> list[Sample]:
    """The samples that `spec` names; synthetic scenes hold their true box only `with_box`. Rows of one id
    differ by their `repeat`.

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
    if match is None:
        raise RecordError(
            f"{spec!r} must be of the form scenes:POOL/START+COUNT, or of "
            "scenes:POOL@TAGSxNUMBERS:KIND,KIND/START+COUNT*PER_SCENE; "
            f"TAGS are at most {MAX_TAGS}, and NUMBERS (digits of a number) {MAX_NUMBERS}"
        )
    if match["pool"] not in POOLS:
        raise RecordError(f"no pool {match['pool']!r} of drawn scenes; there are {', '.join(POOLS)}")
    max_tags, numbers, looks = read_level(match)
    kinds = LOOK_KINDS if looks else KINDS
    try:
        if match["kinds"]:
            kinds = tuple(map(check_kind, match["kinds"].split(",")))
        check_level(kinds, looks)
    except ValueError as error:
        raise RecordError(f"{spec}: {error}") from error
    return scene_samples(
        match["pool"],
        int(match["start"]),
        int(match["count"]),
        per_scene=int(match["each"] or 1),
        kinds=kinds,
        with_box=with_box,
        max_tags=max_tags,
        numbers=numbers,
        looks=looks,
    )


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
    other = other_format(row.raw, "visrl", Reading()) if row.fault else None
    if other is None:
        return ""
    name = ", or name it in dataset_info.json" if other == "sharegpt" else ""
    command = f"visrl data convert --from {other} --to visrl {shlex.quote(path)} OUT.jsonl"
    return f"; it has the keys of {other}: `{command}`{name}"


def hash_source(spec: str, dataset_dir: str = "data") -> str:
    """One short hash over the files that `spec` names, and over the module of a format of one's own that reads them;
    what names no files (drawn scenes, a file that is not there) stands for itself.

    Raises:
        ConfigError: there is no such module.
    """
    if spec.startswith("scenes:"):
        return spec
    if is_named(spec, dataset_dir):
        entries = [find_entry(dataset_dir, part.strip()) for part in spec.split(",")]
        files = [entry.path for entry in entries]
        for own in sorted({entry.formatting for entry in entries if is_plugin(entry.formatting)}):
            find_format(own)  # says so where there is none
            files += filter(None, [plugin_file(own)])
    else:
        files = [Path(spec)]
    known = all(file.is_file() or is_hf(file) for file in files)
    return hash_files(*files) if known else spec


# --- Data sets that other tools describe ------------------------------------------------------------------------------


def named_samples(
    name: str, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[Sample]:
    """The samples of SFT data sets. Round 1 and round 2 of one question become one sample with box and answer.

    Raises:
        RecordError: no such data set, or none of its rows can be read.
    Warns:
        VisrlWarning: some rows cannot be read; how many, and the first reason.
    """
    answered: list[Sample] = []
    boxes: dict[tuple[str, str], list[Sample]] = {}  # round 1: where to look, and no answer
    for record in _records(name, folder, images):
        if not isinstance(record, Sample):
            raise RecordError(f"{name} holds preferences; warm-up needs questions with boxes and answers")
        if record.answer:
            answered.append(record)
        else:
            boxes.setdefault((record.image, record.question), []).append(record)
    samples = []
    for record in answered:
        of_round_1 = boxes.get((record.image, record.question))
        samples.append(replace(record, box=record.box or of_round_1.pop(0).box) if of_round_1 else record)
        if of_round_1 and record.box:
            of_round_1.pop(0)
    return samples + [record for alike in boxes.values() for record in alike]


def named_preferences(
    name: str, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> list[Preference]:
    """The preferences of `ranking: true` data sets, in the order of their rows.

    Raises, warns: as `named_samples`.
    """
    preferences = []
    for record in _records(name, folder, images):
        if not isinstance(record, Preference):
            raise RecordError(f'{name} holds no preferences: its entry needs "ranking": true')
        preferences.append(record)
    return preferences


def hf_samples(path: str | os.PathLike[str], images: str | os.PathLike[str] | None = None) -> list[Sample]:
    """The samples of a parquet file, or of a folder that `datasets` saved.

    Raises, warns: as `named_samples`.
    """
    folder = Path(path).parent
    rows = read_hf(path, sizes=Sizes(images=images or folder))
    records = _placed(_taken(rows, path, f"--from hf {shlex.quote(str(path))}"), folder, images)
    return [record for record in records if isinstance(record, Sample)]


def _records(
    name: str, folder: str | os.PathLike[str], images: str | os.PathLike[str] | None
) -> Iterator[Sample | Preference]:
    entries = [find_entry(folder, part.strip()) for part in name.split(",")]
    found = False
    for entry in entries:
        rows = read_entry(entry, Reading(Sizes(images=images or folder)))
        options = f"--from sharegpt --dataset {shlex.quote(entry.name)} {shlex.quote(str(entry.path.parent))}"
        beside = entry.name if len(entries) > 1 else ""
        for record in _placed(_taken(rows, entry.path, options, beside), folder, images):
            found = True
            yield record
    if not found:
        raise RecordError(f"{name}: no question about a picture is in it")


def _placed(
    records: Iterable[Sample | Preference], folder: str | os.PathLike[str], images: str | os.PathLike[str] | None
) -> Iterator[Sample | Preference]:
    """The records with their images looked for beside the data where no folder of images is given, and none lies at
    the path as it stands: other tools name images from the folder of the data set."""
    if images is not None:
        yield from records
        return

    @lru_cache(maxsize=10_000)
    def found(ref: str) -> str:
        beside = image_path(ref, Path(folder)) if names_file(ref) and image_path(ref) is None else None
        return ref if beside is None else str(beside)

    for record in records:
        if isinstance(record, Sample):
            yield replace(record, image=found(record.image))
        else:
            yield replace(record, images=tuple(replace(each, ref=found(each.ref)) for each in record.images))


def _taken(
    rows: Iterable[DataRow], path: str | os.PathLike[str], options: str, beside: str = ""
) -> Iterator[Sample | Preference]:
    """The records of good rows; what of the others and of columns is left out is said at the end, in warnings.

    `beside` is the name of a set that is used together with others: where it holds no image at all it is left out.

    Raises:
        RecordError: no row can be read.
    """
    good, bad, first = 0, Counter[str](), DataRow(0, None)
    notes = Counter[str]()
    for row in rows:
        good += not row.fault
        notes.update(row.notes)
        if row.fault:
            first = first if bad else row
            bad[row.fault] += 1
        yield from row.records
    for line in format_notes(notes):
        warnings.warn(f"{path}: {line}", VisrlWarning, stacklevel=4)
    if beside and not good and set(bad) == {"no_picture"}:
        left_out = f"{beside} is left out: none of its {bad.total():,} rows has a picture"
        warnings.warn(left_out, VisrlWarning, stacklevel=4)
    elif bad:
        share = f"{bad.total():,} of {good + bad.total():,} rows cannot be read"
        what = f"{path}: {share}; row {first.number}: {first.reason}"
        if not good:
            raise RecordError(what)
        warnings.warn(f"{what} (`visrl data check {options}` counts them all)", VisrlWarning, stacklevel=4)
