"""Results as lines of text for a terminal: figures with intervals, both readings side by side. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from visrl.rewards.results import ANSWER_COLUMNS, BOX_COLUMNS, NO_OTHER, READINGS

HEADINGS = {"counted": "failures counted 0", "left_out": "failures left out"}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines: the first column to the left, the others to the right."""
    cells = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) if not index else cell.rjust(width) for index, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in cells)
    ]
    return [lines[0].rstrip(), "  ".join("─" * width for width in widths), *(line.rstrip() for line in lines[1:])]


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The lines of `results.summarise`: counts, then tables of all data sets and their mean.

    Columns of answers and of boxes stand side by side; one whose two readings differ has a table of its own.
    """
    counts = [f"{summary['n']:,} questions", f"{summary['failed']} failed"]
    counts += [f"{summary[name]} {what}" for name, what in _NOTES.items() if summary.get(name)]
    lines = [", ".join(counts)]
    for column, what in _NOT_APPLICABLE.items():
        without = summary["columns"].get(column, {}).get("not_applicable")
        if without:
            lines.append(f"{column}: without {without:,} questions {what}")
    differing = [column for column in summary["columns"] if _differs(summary, column)]
    for family in (ANSWER_COLUMNS, BOX_COLUMNS):
        columns = [column for column in summary["columns"] if column in family and column not in differing]
        if columns:
            rows = [
                [name, str(entry["n"]), *(format_percent(_counted(entry, column)) for column in columns)]
                for name, entry in _lines_of(summary)
            ]
            lines += ["", *table(["", "n", *columns], rows)]
    for column in differing:
        rows = [_summary_row(name, entry["columns"][column]) for name, entry in _lines_of(summary)
                if column in entry["columns"]]  # fmt: skip
        lines += ["", *table([column, *(HEADINGS[reading] for reading in READINGS), "unread"], rows)]
    return lines


def _lines_of(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every data set by its name, and their mean; one data set is its own mean."""
    named = list(summary["datasets"].items())
    return [(named[0][0] or "all", summary)] if len(named) == 1 else [*named, ("mean", summary)]


def _differs(summary: Mapping[str, Any], column: str) -> bool:
    entries = [entry["columns"].get(column) for _, entry in _lines_of(summary)]
    return any(entry and entry["counted"] != entry["left_out"] for entry in entries)


def _counted(entry: Mapping[str, Any], column: str) -> Mapping[str, float] | None:
    return entry["columns"][column]["counted"] if column in entry["columns"] else None


def comparison_lines(result: Mapping[str, Any], name_a: str, name_b: str, is_crop: bool = False) -> list[str]:
    """The lines of `compare.compare`: one table per column, the second reading only where something is left out; then
    what B gains and harms, by its crop alone where A is the same without one (`is_crop`)."""
    lines = [f"A = {name_a}", f"B = {name_b}", f"{result['n']:,} questions on both sides"]
    if result["only_a"] or result["only_b"]:
        lines.append(f"left out: {result['only_a']} that A alone holds, {result['only_b']} that B alone holds")
    if result.get("skipped"):
        lines.append(f"left out: {result['skipped']} that a mode does not apply to ({NO_OTHER})")
    for column, readings in result["columns"].items():
        rows = []
        several = len(result["datasets"]) > 1
        for reading in READINGS if readings["counted"] != readings["left_out"] else READINGS[:1]:
            if several:
                for name, columns in result["datasets"].items():
                    rows.append(_comparison_row(name, reading, columns[column][reading]))
            rows.append(_comparison_row("mean" if several else "all", reading, readings[reading]))
        lines += ["", *table([column, "reading", "n", "A", "B", "B − A", "95 % interval", "McNemar p"], rows)]
    if result.get("right"):
        lines += ["", *_gain_lines(result["right"], "crop " if is_crop else "")]
    return lines


def _gain_lines(right: Mapping[str, Any], what: str) -> list[str]:
    """What B gains over A and what it harms, which is the difference of the two accuracies."""
    n, gain, harm = right["n"], right["gain"], right["harm"]
    return [
        f"right by {right['right_by']}, of {n:,} questions: {right['both']} in both, {right['neither']} in neither",
        f"{what}gain  {gain:5} ({gain / n:.1%}), right in B alone",
        f"{what}harm  {harm:5} ({harm / n:.1%}), right in A alone",
        f"gain − harm = {gain - harm:+} = {100 * right['difference']:+.1f} points "
        f"[{100 * right['low']:+.1f}, {100 * right['high']:+.1f}]",
    ]


def quadrant_lines(cells: Mapping[str, int]) -> list[str]:
    """Grounded × right, as counts and shares of `n`."""
    n = cells["n"]
    rows = [
        [name, *(f"{cells[f'{grounded}_{name}']:,} ({cells[f'{grounded}_{name}'] / n:.1%})" for grounded in _GROUNDED)]
        for name in ("right", "wrong")
    ]
    lines = table(["answer", *_GROUNDED.values()], rows)
    return [*lines, f"left out: {cells['left_out']} of which that is not known"] if cells["left_out"] else lines


def choice_lines(scores: Mapping[str, Any]) -> list[str]:
    """What a benchmark with readings adds up to over all its questions, however they are spread over its parts."""
    said = scores.get("reading", "")
    lines = [f"over all questions, read as {said} ({scores.get('rule', '')}):"]
    for column, entry in scores["overall"].items():
        if entry["counted"]:
            left_out = entry["left_out"]
            other = f"; failures left out {format_percent(left_out)}" if left_out != entry["counted"] else ""
            lines.append(f"  {column} {format_percent(entry['counted'])} of {entry['counted']['n']:,}{other}")
    if "chance" in scores:
        lines.append(f"  a letter drawn by lot gets {scores['chance']:.1%}")
    if "unreadable" in scores:
        lines.append(f"  {scores['unreadable']:,} replies name no option, and count as wrong")
    return lines


def logged_lines(scores: Mapping[str, Any]) -> list[str]:
    """What prediction files of toolkits say of themselves, and which of their tasks have no rule that is known."""
    lines = []
    for task, metrics in scores["logged"].items():
        said = ", ".join(f"{name} {one['mean']:.1%} of {one['n']:,}" for name, one in metrics.items())
        lines += [f"as the file of {task} itself has it: {said}"] if said else []
    without = [task for task, rule in scores["rules"].items() if rule is None]
    return [
        *lines,
        *([f"no published rule is known for {', '.join(without)}: name one with --rule"] if without else []),
    ]


_NOTES = {
    "unparseable": "box texts that hold no box",
    "bad_truth": "with a ground truth that is no box",
    "skipped": f"left out ({NO_OTHER})",
}
_GROUNDED = {"grounded": "crop holds the evidence", "ungrounded": "crop misses it"}
_NOT_APPLICABLE = {
    "right_object": "on whose image no other object is known",
    "grounded": "whose evidence is not known",
}


def format_percent(entry: Mapping[str, float] | None) -> str:
    """`54.3 [52.1, 56.4]`, in percent; a dash where there is no figure."""
    return f"{entry['mean']:.1%} [{entry['low']:.1%}, {entry['high']:.1%}]".replace("%", "") if entry else "–"


def _summary_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [name, *(format_percent(entry[reading]) for reading in READINGS), str(entry["unread"])]


def _comparison_row(name: str, reading: str, entry: Mapping[str, Any] | None) -> list[str]:
    if entry is None:
        return [name, HEADINGS[reading], "0", "–", "–", "–", "–", "–"]
    return [
        name,
        HEADINGS[reading],
        str(entry["n"]),
        f"{100 * entry['a']:.1f}",
        f"{100 * entry['b']:.1f}",
        f"{100 * entry['difference']:+.1f}",
        f"[{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]",
        f"{entry['p_mcnemar']:.3g}" if "p_mcnemar" in entry else "–",
    ]


def looks_line(looks: Mapping[str, Any]) -> str:
    """How often was looked, and how the episodes ended."""
    ends = ", ".join(f"{name} {count:,}" for name, count in looks["ends"].items())
    return f"looks a question: {looks['mean']:.2f}; ends: {ends}"
