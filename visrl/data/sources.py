"""Where samples and preferences come from, by one string: drawn scenes, a named data set, or a file of ours.

`scenes:POOL/START+COUNT` names drawn scenes (`scenes:preference/0+2000`), `scenes:POOL@TAGS:KIND,KIND/START+COUNT`
those of at most TAGS tags with questions of these kinds alone, either part left out where it does not matter; a name in
`dataset_dir/dataset_info.json` is that data set; anything else is a path to JSONL records.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast, get_args

from visrl.data.named import is_named, named_preferences, named_samples
from visrl.data.scenes import KINDS, MAX_TAGS, POOLS, Kind, scene_samples
from visrl.data.sharegpt import find_entry
from visrl.manifest import hash_files
from visrl.records import Preference, RecordError, Sample, read_records

_SCENES = re.compile(
    r"scenes:(?P<pool>\w+?)(@(?P<tags>[1-4]))?(:(?P<kinds>\w+(,\w+)*))?/(?P<start>\d+)\+(?P<count>\d+)"
)


def read_samples(
    spec: str, *, with_box: bool = False, dataset_dir: str = "data", image_root: str | None = None
) -> list[Sample]:
    """The samples that `spec` names; drawn ones hold their true box only where it is asked for.

    Raises:
        RecordError: no such pool or file, or a row that is no sample.
    """
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
    if spec.startswith("scenes:"):
        raise RecordError(f"{spec!r} must be of the form scenes:POOL/START+COUNT")
    if is_named(spec, dataset_dir):
        return named_samples(spec, dataset_dir, image_root)
    if not Path(spec).is_file():
        raise RecordError(
            f"no data {spec!r}: give a JSONL file of samples, a name in {dataset_dir}/dataset_info.json, "
            "or scenes:POOL/START+COUNT"
        )
    return list(read_records(Sample, spec))


def read_preferences(spec: str, *, dataset_dir: str = "data", image_root: str | None = None) -> list[Preference]:
    """The preferences of a named data set or a JSONL file.

    Raises:
        RecordError: no such file, or a row that is no preference.
    """
    if is_named(spec, dataset_dir):
        return named_preferences(spec, dataset_dir, image_root)
    if not Path(spec).is_file():
        raise RecordError(
            f"no data {spec!r}: give the preferences.jsonl of `visrl filter`, or a name in "
            f"{dataset_dir}/dataset_info.json"
        )
    return list(read_records(Preference, spec))


def hash_source(spec: str, dataset_dir: str = "data") -> str:
    """One short hash over the files that `spec` names; what names no files (drawn scenes, a file that is not there)
    stands for itself."""
    if spec.startswith("scenes:"):
        return spec
    if is_named(spec, dataset_dir):
        files = [find_entry(dataset_dir, part.strip()).path for part in spec.split(",")]
    else:
        files = [Path(spec)]
    return hash_files(*files) if all(file.is_file() for file in files) else spec
