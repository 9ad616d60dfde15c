"""Where samples and preferences come from, by one string: drawn scenes, a named data set, or a file of ours.

`scenes:POOL/START+COUNT` names drawn scenes (`scenes:preference/0+2000`), `scenes:POOL@TAGS/START+COUNT` those of at
most TAGS tags; a name in `dataset_dir/dataset_info.json` is that data set; anything else is a path to JSONL records.
"""

from __future__ import annotations

import re
from pathlib import Path

from visrl.data.named import is_named, named_preferences, named_samples
from visrl.data.scenes import MAX_TAGS, POOLS, scene_samples
from visrl.records import Preference, RecordError, Sample, read_records

_SCENES = re.compile(r"scenes:(\w+?)(?:@([1-4]))?/(\d+)\+(\d+)")


def read_samples(
    spec: str, *, with_box: bool = False, dataset_dir: str = "data", image_root: str | None = None
) -> list[Sample]:
    """The samples that `spec` names; drawn ones hold their true box only where it is asked for.

    Raises:
        RecordError: no such pool or file, or a row that is no sample.
    """
    match = _SCENES.fullmatch(spec)
    if match:
        if match[1] not in POOLS:
            raise RecordError(f"no pool {match[1]!r} of drawn scenes; there are {', '.join(POOLS)}")
        tags = int(match[2] or MAX_TAGS)
        return scene_samples(match[1], int(match[3]), int(match[4]), with_box=with_box, max_tags=tags)
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
