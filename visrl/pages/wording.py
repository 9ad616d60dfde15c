"""How the report writes a number: one look for percentages, differences, counts and durations."""

from __future__ import annotations

NO_BREAK = "\u00a0"  # a number and its unit stay on one line


def percent(value: float, digits: int = 1) -> str:
    """A fraction of 1 in percent."""
    return f"{100 * value:.{digits}f}{NO_BREAK}%"


def signed(change: float, measure: str, unit: str = NO_BREAK + "points") -> str:
    """A change of `measure` with its sign: an IoU as it is, anything else in percentage points."""
    text = f"{change:+.3f}" if measure == "box_iou" else f"{100 * change:+.1f}{unit}"
    return text.replace("-", "−")


def measured(value: float, measure: str) -> str:
    """A value of `measure`: an IoU with three decimals, anything else in percent."""
    return f"{value:.3f}" if measure == "box_iou" else percent(value)


def number(value: float | None, digits: int = 2) -> str:
    """A number with its digits, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def plus(value: float | None, digits: int = 2) -> str:
    """A number with its sign, a dash where there is none; what rounds to zero has no sign."""
    if value is None:
        return "–"
    text = f"{value:+.{digits}f}"
    return number(0.0, digits) if float(text) == 0 else text.replace("-", "−")


def between(low: float, high: float, measure: str) -> str:
    """An interval of `measure` in brackets, in the unit of the value it stands beside."""
    return f"[{low:.3f}, {high:.3f}]" if measure == "box_iou" else f"[{100 * low:.1f}, {100 * high:.1f}]"


def count(number: int, noun: str = "") -> str:
    """A whole number with its thousands set apart, and the noun in singular or plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if noun else f"{number:,}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
