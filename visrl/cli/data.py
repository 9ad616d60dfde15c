"""`visrl data`: convert, check and stats. Parses, then imports what the verb needs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from visrl.cli.verbs import Verbs
from visrl.config import CheckpointConfig, Config, ConfigError, build_config, read_yaml

if TYPE_CHECKING:
    from visrl.data.formats import Reading


class _DataVerbs(Verbs):
    """Puts the table of formats into the help of a verb that is asked for: the other verbs need not read it."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from visrl.data.formats import SOURCES, TARGETS

        command = super().get_command(ctx, cmd_name)
        for option in command.params if command else ():
            if option.name in ("source", "target"):
                option.help = option.help.format(  # type: ignore[attr-defined]
                    sources=", ".join(SOURCES), targets=", ".join(TARGETS)
                )
        return command


app = typer.Typer(cls=_DataVerbs, help="Convert, check and describe data sets.", no_args_is_help=True)

_FROM = "Format of the input: {sources}, or module:NAME of your own."
From = Annotated[str, typer.Option("--from", help=_FROM)]
Inputs = Annotated[list[str], typer.Argument(metavar="IN…", help="Data files, or data sets for hf.")]
SizesFile = Annotated[
    list[str] | None,
    typer.Option("--sizes", help="Detection or metadata JSONL with image sizes; may repeat."),
]
Images = Annotated[str | None, typer.Option("--images", help="Folder of the images.")]
Space = Annotated[str | None, typer.Option("--box-space", help="What three-decimal boxes mean: image, padded_square.")]
Dataset = Annotated[str | None, typer.Option("--dataset", help="Name in dataset_info.json (sharegpt).")]
Columns = Annotated[list[str] | None, typer.Option("--columns", help="ours=theirs, for hf; may repeat.")]

Split = Annotated[str | None, typer.Option("--split", help="Split of a data set, for hf; train by default.")]


class ConvertConfig(Config):
    """What `--config` may hold; the command line goes before it."""

    source: str = "visrl"
    target: str = "visrl"
    sizes: list[str] = Field(default_factory=list)
    images: str | None = None
    skip: dict[str, int] = Field(default_factory=dict)
    take: dict[str, int] = Field(default_factory=dict)
    seed: int = 88
    validation: float = Field(0.0, ge=0, lt=1)
    box_space: str = "image"


@app.command()
def convert(
    inputs: Inputs,
    out: Annotated[str, typer.Argument(metavar="OUT", help=".json is written as a list, .jsonl as lines.")],
    source: Annotated[str | None, typer.Option("--from", help=_FROM)] = None,
    target: Annotated[str | None, typer.Option("--to", help="{targets}, or module:NAME.")] = None,
    sizes: SizesFile = None,
    images: Images = None,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="Rows to skip: N of each data set, or NAME=N of one.")
    ] = None,
    take: Annotated[
        list[str] | None, typer.Option("--take", help="Rows to take after those: N of each data set, or NAME=N of one.")
    ] = None,
    validation: Annotated[
        float | None,
        typer.Option("--validation", help="Share of the images held out: their rows go to the .val file of OUT."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of that choice; 88 by default.")] = None,
    box_space: Space = None,
    dataset: Dataset = None,
    columns: Columns = None,
    split: Split = None,
    config: Annotated[
        str | None, typer.Option("--config", help="YAML with these options (configs/data_*.yaml).")
    ] = None,
) -> None:
    """Convert between formats; rows that cannot be converted go to OUT.bad.jsonl with the reason."""
    from visrl.data.convert import Selection
    from visrl.data.convert import convert as run
    from visrl.data.rows import format_notes

    given = {
        "source": source, "target": target, "sizes": sizes, "images": images, "seed": seed,
        "validation": validation, "box_space": box_space,
        "skip": _counts(skip), "take": _counts(take),
    }  # fmt: skip
    values = read_yaml(config) if config else {}
    values |= {key: value for key, value in given.items() if value not in (None, {})}
    for needed, option in (("source", "--from"), ("target", "--to")):
        if needed not in values:
            raise ConfigError(f"say the format with {option} FORMAT")
    options = build_config(ConvertConfig, values, where=config or "the command line")
    space = _space(options.box_space)
    _refuse_options(options.source, dataset=dataset, columns=columns, split=split)
    reading = _reading(options.sizes, options.images, box_space, dataset, columns, split)
    with _progress() as tick:
        summary = run(
            options.source,
            options.target,
            inputs,
            out,
            reading=reading,
            selection=Selection(options.skip, options.take),
            box_space=space,
            validation=options.validation,
            seed=options.seed,
            progress=tick,
        )
    print(f"read {summary.rows:,} rows from {', '.join(inputs)}")
    if summary.left_out:
        print(f"left out {summary.left_out:,} by --skip and --take")
    for path, count in summary.written.items():
        print(f"wrote {count:,} rows to {path}")
    if summary.picture_folder is not None:
        folder = summary.picture_folder
        print(f"wrote {summary.pictures:,} pictures to {folder}; the rows name them from {folder.parent} (image_root)")
    for line in format_notes(summary.notes):
        print(line)
    if summary.bad:
        faults = ", ".join(f"{count:,} {fault}" for fault, count in summary.bad.most_common())
        print(f"listed {sum(summary.bad.values()):,} bad rows in {out}.bad.jsonl: {faults}")
        if not any(summary.written.values()):
            print(f"visrl: none of the rows can be written; {out}.bad.jsonl says why", file=sys.stderr)
            raise typer.Exit(1)


@app.command()
def check(
    inputs: Inputs,
    source: From,
    images: Images = None,
    sizes: SizesFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    box_space: Space = None,
    dataset: Dataset = None,
    columns: Columns = None,
    split: Split = None,
) -> None:
    """Report bad rows, missing and broken images, duplicates, and images that occur in two splits."""
    from visrl.data.check import as_text
    from visrl.data.check import check as run

    _refuse_options(source, dataset=dataset, columns=columns, split=split, box_space=box_space)
    if images is not None and not Path(images).is_dir():
        print(f"visrl: there is no folder {images}; every picture counts as missing", file=sys.stderr)
    reading = _reading(sizes, images, box_space, dataset, columns, split)
    with _progress() as tick:
        report = run(source, inputs, reading, tick)
    print(json.dumps(report.as_json()) if as_json else as_text(report, reading.sizes.images))


@app.command()
def stats(
    inputs: Inputs,
    source: From,
    images: Images = None,
    sizes: SizesFile = None,
    model: Annotated[str | None, typer.Option("--model", help="Checkpoint whose processor counts tokens.")] = None,
    image_max_pixels: Annotated[int | None, typer.Option(help="Pixel limit of the image, for counting tokens.")] = None,
    crop_max_pixels: Annotated[int | None, typer.Option(help="Pixel limit of the crop, for counting tokens.")] = None,
    html: Annotated[str | None, typer.Option("--html", help="Write the page here.")] = None,
    box_space: Space = None,
    dataset: Dataset = None,
    columns: Columns = None,
    split: Split = None,
) -> None:
    """Count rows, boxes, images and tokens: a table, and with --html a page of histograms."""
    from visrl.data.stats import as_table, measure

    _refuse_options(source, dataset=dataset, columns=columns, split=split, box_space=box_space)
    tokens = _token_counts(model, image_max_pixels, crop_max_pixels) if model else None
    reading = _reading(sizes, images, box_space, dataset, columns, split)
    with _progress() as tick:
        found = measure(source, inputs, reading, tokens, tick)
    print(as_table(found))
    if html:
        from visrl.data.stats_page import write_stats_page

        write_stats_page(found, ", ".join(Path(path).name for path in inputs), html)
        print(f"wrote {html}")


def _token_counts(model: str, image_max_pixels: int | None, crop_max_pixels: int | None) -> Any:
    from visrl.engines.open import model_settings, open_encoder
    from visrl.models.load import CheckpointError
    from visrl.models.tokens import TokenCounts

    named = CheckpointConfig(model_name_or_path=model)
    settings = model_settings(named).with_given(image_max_pixels=image_max_pixels, crop_max_pixels=crop_max_pixels)
    try:
        return TokenCounts(open_encoder(named, settings))
    except CheckpointError as error:
        raise ConfigError(f"--model: {error}") from error


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Rows read so far, on standard error: a live line on a terminal, else a line every 100,000 rows."""
    start = time.monotonic()
    live = sys.stderr.isatty()
    every = 5_000 if live else 100_000

    def tick(rows: int) -> None:
        if rows % every == 0:
            rate = rows / max(1e-9, time.monotonic() - start)
            print(f"{rows:,} rows, {rate:,.0f} rows/s", end="\r" if live else "\n", file=sys.stderr, flush=True)

    yield tick
    if live:
        print(" " * 40, end="\r", file=sys.stderr, flush=True)


def _reading(
    sizes: list[str] | None, images: str | None, box_space: str | None, dataset: str | None,
    columns: list[str] | None, split: str | None,
) -> Reading:  # fmt: skip
    """How the input is read, by the options of the command line."""
    from visrl.data.formats import Reading
    from visrl.data.sizes import Sizes

    space = _space(box_space) if box_space else None
    return Reading(Sizes(sizes, images), space, dataset, _pairs(columns), split or "train")


def _refuse_options(source: str, **given: Any) -> None:
    """Refuse options that mean nothing for the format that is read.

    Raises:
        ConfigError: with the first of them.
        RecordError: there is no such format.
    """
    from visrl.data.formats import FORMATS, find_format

    if given.get("box_space"):
        _space(given["box_space"])
    taken = find_format(source).options
    for option, value in given.items():
        if value and option not in taken:
            takers = ", ".join(name for name, each in FORMATS.items() if option in each.options)
            raise ConfigError(f"--{option.replace('_', '-')} is for --from {takers}; it says nothing of {source}")


def _space(name: str) -> Any:
    from visrl.codecs import BOX_SPACES

    if name not in BOX_SPACES:
        raise ConfigError(f"box_space must be one of {', '.join(BOX_SPACES)}, not {name!r}")
    return name


def _counts(values: list[str] | None) -> dict[str, int]:
    """`10000` for every data set, `gqa=500` for one."""
    counts = {}
    for value in values or []:
        name, _, number = value.rpartition("=")
        if not number.isdecimal():
            raise ConfigError(f"{value!r} must be a number of rows, or NAME=number")
        counts[name] = int(number)
    return counts


def _pairs(values: list[str] | None) -> dict[str, str]:
    pairs = {}
    for value in values or []:
        ours, equals, theirs = value.partition("=")
        if not equals:
            raise ConfigError(f"--columns takes ours=theirs, not {value!r}")
        pairs[ours] = theirs
    return pairs
