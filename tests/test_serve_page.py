"""The page in a real browser: picture, questions, boxes, keyboard, phone, download, and nothing from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Page, browser
from PIL import Image
from serve_help import get, known
from waiting import wait_until

from visrl.conversation import Conversation
from visrl.scenes import SIDE
from visrl.zoom.protocols import ZOOM_PROTOCOLS

pytestmark = pytest.mark.slow

IDLE = "document.querySelectorAll('.busy').length === 0"


def speak(conversation: Conversation) -> str:
    """A box that depends on the question, an answer with focus, and another without."""
    text = conversation.messages[0].text
    if "three" in text and len(conversation.views) < 4:
        return f"[0.{len(conversation.views)}00, 0.200, 0.500, 0.600]"
    if "three" in text:
        return "all three"
    if len(conversation.views) == 2:
        whole, detail = conversation.views
        return "perhaps nine" if detail.size == whole.size else "seven <b>&amp;</b>"
    return (
        "nowhere" if "lost" in text else "[0.250, 0.500, 0.750, 1.000]" if "second" in text else "[0.1, 0.2, 0.3, 0.4]"
    )


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[tuple[Page, Path, str]]:
    """The page, ready, with a folder for files and the server's address."""
    with known(speak, token_s=0.005) as (url, _, _), browser(tmp_path) as page:
        page.resize(1280, 800)
        page.goto(url)
        page.wait("document.querySelector('#status').dataset.state === 'ok'")
        yield page, tmp_path, url
        assert page.problems == []
        assert all(asked.startswith((url, "data:", "blob:")) for asked in page.requests)


def add_picture(page: Page, folder: Path, size: tuple[int, int] = (400, 300), name: str = "street.png") -> Path:
    path = folder / name
    Image.linear_gradient("L").resize(size).convert("RGB").save(path)
    page.choose_file("#file", path)
    page.wait("!document.querySelector('#stage').hidden && document.querySelector('#picture').complete")
    return path


def ask(page: Page, text: str) -> None:
    page.type(text)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.card').length > 0 && {IDLE}")


def outlines(page: Page) -> list[list[float]]:
    """The boxes drawn, the picked one last, in pixels of the picture."""
    script = (
        "[...document.querySelectorAll('.outline')].map(r => ['x','y','width','height'].map(k => +r.getAttribute(k)))"
    )
    return page.run(script)


def test_a_question_shows_box_crop_and_both_answers(shown: tuple[Page, Path, str]) -> None:
    page, folder, _ = shown
    add_picture(page, folder)
    ask(page, "What is first?")
    assert outlines(page) == [[40, 60, 80, 60]]
    assert page.run("document.querySelector('.focus .answer').textContent") == "seven <b>&amp;</b>"
    assert page.run("document.querySelector('.plain .answer').textContent") == "perhaps nine"
    assert page.run(
        "[document.querySelector('.crop').naturalWidth, document.querySelector('.crop').naturalHeight]"
    ) == [
        80,
        60,
    ]
    assert page.run("document.querySelector('.where').textContent") == "40, 60, 120, 120"


def test_three_looks_are_drawn_in_order_and_clicked_through(shown: tuple[Page, Path, str]) -> None:
    page, folder, _ = shown
    add_picture(page, folder)
    page.run("document.querySelector('details').open = true, document.querySelector('#looks').value = 3, 0")
    ask(page, "What are all three?")
    assert page.run("document.querySelector('.focus .answer').textContent") == "all three"
    assert page.run("[...document.querySelectorAll('.look-number')].map(b => b.textContent)") == ["1", "2", "3"]
    assert outlines(page) == [[40, 60, 160, 120], [80, 60, 120, 120], [120, 60, 80, 120]]  # the shown one last
    page.run("document.querySelectorAll('.look-number')[0].click(), 0")
    assert outlines(page)[-1] == [40, 60, 160, 120]
    assert page.run("document.querySelector('.where').textContent") == "40, 60, 200, 180"
    assert page.run("document.querySelector('[aria-pressed=true].look-number').textContent") == "1"
    page.screenshot(folder / "looks.png")


def zoom(conversation: Conversation) -> str:
    """A checkpoint of DeepEyes: a call, one that cannot be followed, another one, and the answer, or calls alone."""
    if len(conversation.messages) == 1:
        return "perhaps nine"
    turn = sum(message.role == "assistant" for message in conversation.messages)
    calls = ["[40, 60, 200, 180]", "[40, 60, 41, 180]", "[80, 60, 200, 180]"]
    if turn == 3 and "endless" not in conversation.messages[1].text:
        return "<think>Clear.</think> <answer>7</answer>"
    said = f'{{"name": "image_zoom_in_tool", "arguments": {{"bbox_2d": {calls[turn % 3]}}}}}'
    return f"<think>Small.</think> <tool_call>{said}</tool_call>"


def test_a_checkpoint_of_a_public_protocol_shows_its_looks_and_what_could_not_be_followed(tmp_path: Path) -> None:
    served = known(zoom, protocol=ZOOM_PROTOCOLS["deepeyes"])
    with served as (url, _, _), browser(tmp_path) as page:
        page.resize(1280, 800)
        page.goto(url)
        page.wait("document.querySelector('#status').dataset.state === 'ok'")
        assert page.run("document.querySelector('#status').textContent") == "known (deepeyes)"
        assert page.run("[document.querySelector('#looks').value, document.querySelector('#tokens').value]") == [
            "5",
            "4096",
        ]
        add_picture(page, tmp_path)
        ask(page, "Which number?")
        assert page.run("document.querySelector('.focus .answer').textContent") == "7"
        assert page.run("document.querySelector('.plain .answer').textContent") == "perhaps nine"
        assert outlines(page) == [[40, 60, 160, 120], [80, 60, 120, 120]]
        page.run("document.querySelectorAll('.look-number')[1].click(), 0")
        assert "ARGUMENTS ARE INVALID" in page.run("document.querySelector('.where').textContent")
        assert page.run("document.querySelector('.crop').hidden") is True
        page.run("document.querySelectorAll('.look-number')[0].click(), 0")
        assert page.run("document.querySelector('.where').textContent") == "40, 60, 200, 180"
        ask(page, "What is endless?")
        said = page.run("document.querySelector('.card .focus .answer').textContent")
        assert said == "no answer: it still looked at its last turn"
        page.screenshot(tmp_path / "protocol.png")
        assert page.problems == []


def test_several_questions_of_one_picture_are_picked_by_keyboard_alone(shown: tuple[Page, Path, str]) -> None:
    page, folder, _ = shown
    add_picture(page, folder)
    ask(page, "What is first?")
    ask(page, "What is second?")
    assert outlines(page) == [[40, 60, 80, 60], [100, 150, 200, 150]]
    for _ in range(20):
        page.press("Tab")
        if page.run("document.activeElement.matches('.card:nth-child(2) .pick')"):
            break
    page.press("Enter")
    assert outlines(page)[-1] == [40, 60, 80, 60]
    assert page.run("document.querySelector('.picked .asked').textContent") == "What is first?"
    page.press("/")
    assert page.run("document.activeElement.id") == "question"
    assert page.run("document.querySelector('#question').value") == ""


def test_a_reply_without_a_box_says_so(shown: tuple[Page, Path, str]) -> None:
    page, folder, _ = shown
    add_picture(page, folder)
    ask(page, "What is lost?")
    assert outlines(page) == []
    assert "nowhere" in page.run("document.querySelector('.where').textContent")
    assert page.run("document.querySelector('#download').disabled") is True


def test_a_dropped_picture_is_opened_and_a_large_one_made_smaller(shown: tuple[Page, Path, str]) -> None:
    page, _, _ = shown
    page.run(
        """new Promise(done => {
          const canvas = Object.assign(document.createElement('canvas'), {width: 4096, height: 1024});
          canvas.getContext('2d').fillRect(0, 0, 9, 9);
          canvas.toBlob(blob => {
            const data = new DataTransfer();
            data.items.add(new File([blob], 'wide.png', {type: 'image/png'}));
            dispatchEvent(new DragEvent('drop', {dataTransfer: data, cancelable: true}));
            done(1);
          });
        })"""
    )
    page.wait("!document.querySelector('#stage').hidden")
    assert page.run("document.querySelector('#caption').textContent") == "wide.png, 2048 × 512 (made smaller)"
    page.run("dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), cancelable: true}))")
    assert page.run("document.querySelector('#notice').textContent") == "That is no picture."


def test_a_scene_is_drawn_with_questions_to_ask(shown: tuple[Page, Path, str]) -> None:
    page, _, _ = shown
    page.run("document.querySelector('#scene').click()")
    page.wait("document.querySelectorAll('.ideas button').length > 0")
    ideas = page.run("document.querySelectorAll('.ideas button').length")
    page.run("document.querySelector('.ideas button').click()")
    page.wait(f"document.querySelectorAll('.card').length === 1 && {IDLE}")
    assert page.run("document.querySelectorAll('.ideas button').length") == ideas - 1
    assert page.run("document.querySelector('#picture').naturalWidth") == SIDE


def test_the_annotated_picture_is_downloaded(shown: tuple[Page, Path, str]) -> None:
    page, folder, _ = shown
    original = Image.open(add_picture(page, folder)).convert("RGB")
    ask(page, "What is first?")
    page.run("document.querySelector('#download').click()")
    target = folder / "street-annotated.png"
    wait_until(lambda: target.is_file() and target.read_bytes().endswith(b"IEND\xaeB`\x82"))
    drawn = Image.open(io.BytesIO(target.read_bytes())).convert("RGB")
    assert drawn.width == 400
    assert drawn.height > 300
    assert drawn.getpixel((40, 90)) == (0x25, 0x63, 0xEB)
    assert drawn.getpixel((300, 250)) == original.getpixel((300, 250))


def test_the_page_fits_a_phone(shown: tuple[Page, Path, str]) -> None:
    page, folder, _ = shown
    page.resize(375, 700, mobile=True)
    add_picture(page, folder, (1200, 500), "a-very-long-name-of-a-picture-without-any-place-to-break-it.png")
    ask(page, "What is a-very-long-word-that-has-no-place-to-break-anywhere-in-it-at-all?")
    assert page.run("document.documentElement.scrollWidth") <= 375
    small = (
        "[...document.querySelectorAll('button, .button')].filter(b => b.offsetHeight && b.offsetHeight < 36).length"
    )
    assert page.run(small) == 0
    assert page.run("getComputedStyle(document.querySelector('#question')).fontSize") == "16px"  # below, phones zoom in


def test_stop_ends_a_long_answer(tmp_path: Path) -> None:
    def long_answer(conversation: Conversation) -> str:
        return speak(conversation) if len(conversation.views) == 1 else "x" * 1000

    with known(long_answer, token_s=0.05) as (url, engine, metrics):
        with browser(tmp_path) as page:
            page.goto(url)
            page.wait("document.querySelector('#status').dataset.state === 'ok'")
            add_picture(page, tmp_path)
            page.type("What is first?")
            page.press("Enter")
            page.wait("document.querySelector('.focus .answer')?.textContent.includes('xxx')")
            engine.go_on.clear()
            page.press("Escape")
            page.wait(IDLE)
            assert page.run("document.querySelector('.focus .answer').textContent") == "stopped"
            wait_until(lambda: metrics.in_flight == 0)
            engine.go_on.set()
        wait_until(lambda: engine.running == 0)
        assert metrics.cancelled >= 1


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    with known(speak, api_key="sesame") as (url, _, _), browser(tmp_path) as page:
        page.goto(url)
        page.wait("document.querySelector('#status').textContent.includes('API key')")
        page.run("document.querySelector('#key').focus()")
        page.type("sesame")
        page.press("Enter")
        page.run("document.querySelector('#key').blur()")
        page.wait("document.querySelector('#status').dataset.state === 'ok'")
        add_picture(page, tmp_path)
        page.run("document.querySelector('#question').focus()")
        ask(page, "What is first?")
        assert outlines(page) == [[40, 60, 80, 60]]


def test_the_page_allows_itself_nothing_from_elsewhere() -> None:
    with known(speak) as (url, _, _):
        for path in ("/", "/page/page.js", "/page/page.css", "/page/icon.svg"):
            reply = get(url + path)
            assert reply.status_code == 200
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
            links = reply.text.replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in links
            assert "https://" not in links
