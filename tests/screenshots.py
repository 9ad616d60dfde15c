"""Take the pictures of docs/SERVING.md from a running server: `python tests/screenshots.py URL FOLDER`."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from chromium import browser

IDLE = "document.querySelectorAll('.busy').length === 0"


def main(url: str, folder: Path) -> None:
    """A drawn scene with two questions about different tags, on a wide screen and on a phone in the dark."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home, browser(Path(home)) as page:
        page.resize(1280, 860)
        page.goto(url)
        page.wait("document.querySelector('#status').dataset.state === 'ok'")
        page.run("document.querySelector('#scene').click()")
        page.wait("document.querySelectorAll('.ideas button').length > 0")
        for cards in (1, 2):
            page.run("document.querySelector('.ideas button').click()")
            page.wait(f"document.querySelectorAll('.card').length === {cards} && {IDLE}")
        time.sleep(1)  # the box is drawn in an animation
        page.screenshot(folder / "serving-page.png")
        page.resize(390, 844, mobile=True, dark=True)
        time.sleep(1)
        page.screenshot(folder / "serving-phone.png")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
