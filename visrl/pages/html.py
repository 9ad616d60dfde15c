"""Self-contained HTML pages: the one place where a template becomes a page. Knows no page's meaning.

`base.html` is the head of every page; a template lies beside the code that fills it, fills the blocks of that head, and
keeps or replaces the style of `page.css`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2

from visrl.pages import wording

HERE = Path(__file__).parent


def render_page(template: Path, **values: Any) -> str:
    """The page that `template` makes of `values`, each of them escaped; a value it misses is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([HERE, template.parent]), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": wording.percent, "measured": wording.measured, "between": wording.between, "count": wording.count,
        "duration": wording.duration, "plain": _plain, "signed": wording.signed,
        "number": wording.number, "plus": wording.plus,
    }  # fmt: skip
    css = (HERE / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(css=css, **values)


def _plain(value: Any) -> str:
    """A config value as one would type it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
