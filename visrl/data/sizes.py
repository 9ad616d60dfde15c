"""Annotated image sizes: from a file that holds them beside the rows, or from the images themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from visrl.box import Size
from visrl.data.rows import RowFault, get_size, get_text, json_items
from visrl.records import RecordError

# Data sets of Visual-CoT whose images lie in another one's folder.
FOLDERS = {"textcap": "textvqa"}


def viscot_path(dataset: str, name: str) -> str:
    """Where Visual-CoT keeps the image `name` of a data set: `cot/<folder>/<name>`."""
    return name if name.startswith("cot/") or not dataset else f"cot/{FOLDERS.get(dataset, dataset)}/{name}"


class Sizes:
    """Width and height of images, by reference.

    `files` are detection or metadata JSONL files; what they do not hold is read from the images under `images`,
    where that is given. A detection file also holds the untruncated box of each benchmark row.
    """

    def __init__(self, files: list[str] | None = None, images: str | os.PathLike[str] | None = None) -> None:
        self.images = Path(images) if images is not None else None
        self._sizes: dict[str, Size] = {}
        self._seen: dict[str, Size] = {}  # of images, turned as their EXIF tags say
        self._boxes: dict[tuple[str, Any], Any] = {}  # by image and question number
        self._more_boxes: dict[tuple[str, Any], list[Any]] = {}  # of numbers that stand for several questions
        for path in files or []:
            self._read(path)

    def of(self, ref: str) -> Size:
        """The width and height of an image.

        Raises:
            RowFault: "no_size", with the remedy.
        """
        size = self._sizes.get(ref) or self._seen.get(ref)
        if size is None:
            size = self._seen[ref] = self._from_image(ref)
        return size

    def annotated(self, ref: str) -> Size | None:
        """The width and height that a file gives for an image, or None; no image is opened."""
        return self._sizes.get(ref)

    def boxes(self, ref: str, question_id: Any) -> list[Any]:
        """What a detection file gives as the four pixels of this question: one box, none, or several of one number."""
        key = (ref, question_id)
        if not isinstance(question_id, (int, str)) or key not in self._boxes:
            return []
        return [self._boxes[key], *self._more_boxes.get(key, ())]

    def _from_image(self, ref: str) -> Size:
        from visrl.images import ImageError, image_size, names_file  # what decodes is not needed to list formats

        if self.images is None and names_file(ref):
            raise RowFault("no_size", f"the size of {ref} is not known: give --sizes FILE or --images DIR")
        try:
            return image_size(ref, self.images)
        except ImageError as error:
            raise RowFault("no_size", f"the size of {ref} is not known: {error}") from error

    def _read(self, path: str) -> None:
        for number, raw in enumerate(json_items(path), start=1):
            try:
                if isinstance(raw, dict) and "img_path" in raw:
                    ref = get_text(raw, "img_path")
                    if "question_id" in raw and (box := raw.get("bbox")) is not None:
                        key = (ref, raw["question_id"])
                        if self._boxes.setdefault(key, box) != box:
                            self._more_boxes.setdefault(key, []).append(box)
                else:
                    ref = viscot_path(get_text(raw, "dataset"), get_text(raw, "image"))
                self._sizes[ref] = get_size(raw)
            except (RowFault, TypeError) as error:
                raise RecordError(
                    f"{path}, row {number}: {error}; --sizes takes detection or metadata JSONL with width and height"
                ) from error
