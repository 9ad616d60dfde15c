"""Servers that we start: they end with us however we end, and a port that is taken is said before a model is loaded."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from serve_help import get, known
from waiting import PATIENCE_S, wait_until

from visrl.config import ConfigError
from visrl.conversation import Conversation
from visrl.engines.base import Sampling
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.openai_server import Endpoint, EndpointError
from visrl.engines.server_process import free_port, served, start, stop
from visrl.engines.started import has_ended
from visrl.records import Message
from visrl.scenes import make_scene, questions_of
from visrl.serve import scenes
from visrl.serve.config import ServeConfig
from visrl.serve.runner import listen, serve

# Says its own number and its child's, then lives on; the child is what vLLM's workers are.
SERVER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".new", "w") as told: told.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
ASKER = "import sys, time; from visrl.engines.server_process import start; start(sys.argv[1:]); time.sleep(600)"


def is_alive(number: int) -> bool:
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def numbers_in(path: Path) -> list[int]:
    wait_until(path.exists)
    return [int(word) for word in path.read_text().split()]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGHUP])
def test_a_server_ends_with_who_started_it(ending: signal.Signals, tmp_path: Path) -> None:
    told = tmp_path / "numbers"
    asker = subprocess.Popen(
        [sys.executable, "-c", ASKER, sys.executable, "-c", SERVER, str(told)], stderr=subprocess.DEVNULL
    )
    numbers = numbers_in(told)
    assert all(map(is_alive, numbers))
    asker.send_signal(ending)
    asker.wait(PATIENCE_S)
    wait_until(lambda: not any(map(is_alive, numbers)))


def test_a_server_started_in_a_thread_that_ends_lives_on_and_is_stopped_with_its_children(tmp_path: Path) -> None:
    told, kept = tmp_path / "numbers", []
    thread = threading.Thread(target=lambda: kept.append(start([sys.executable, "-c", SERVER, str(told)])))
    thread.start()
    thread.join()
    numbers = numbers_in(told)
    time.sleep(0.2)
    assert all(map(is_alive, numbers))
    stop(kept[0])
    wait_until(lambda: not any(map(is_alive, numbers)))


def test_a_server_that_ends_tells_its_status_and_its_words(tmp_path: Path) -> None:
    process = start([sys.executable, "-c", "import sys; print('out of memory'); sys.exit(7)"], tmp_path / "log")
    assert process.wait(PATIENCE_S) == 7
    stop(process)
    assert "out of memory" in (tmp_path / "log").read_text()
    killed = start([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert killed.wait(PATIENCE_S) == -signal.SIGKILL
    stop(killed)
    with pytest.raises(EndpointError, match="no-such-program"):
        start(["no-such-program"])


def test_a_program_that_the_system_refuses_is_said_without_a_traceback(tmp_path: Path) -> None:
    program = tmp_path / "vllm"
    program.write_bytes(b"\x7fELF and then nothing")
    program.chmod(0o755)
    process = start([str(program)], tmp_path / "log")
    assert process.wait(PATIENCE_S) == 126
    stop(process)
    said = (tmp_path / "log").read_text()
    assert "cannot be started" in said
    assert "Traceback" not in said


# --- The port ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_taken_port_is_said_before_a_model_is_looked_for(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServeConfig(model_name_or_path="no/such/model", host=host, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="is it taken"):
            serve(config)


def test_a_host_without_an_address_and_a_port_that_is_not_ours_are_said() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on nowhere\.invalid:8000"):
        listen("nowhere.invalid", 8000)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:8000"):
        listen("192.0.2.1", 8000)


def test_a_name_of_several_addresses_has_one_port() -> None:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(listening) for listening in listen("localhost", 0)]
        assert len({listening.getsockname()[1] for listening in sockets}) == 1


# --- Keys and scenes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["API_KEY", "API_PORT", "API_HOST", "API_MODEL_NAME"])
@pytest.mark.parametrize("value", ["", "  "])
def test_a_variable_that_is_set_to_nothing_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is set to nothing"):
        ServeConfig(model_name_or_path="m").with_environment({name: value})


@pytest.mark.parametrize("key", ["two words", "line\nbreak", " "])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="sent in a header"):
        serve(ServeConfig(model_name_or_path="no/such/model", api_key=key))


def test_scenes_are_drawn_for_the_own_page_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    draw = scenes._draw_scene
    monkeypatch.setattr(scenes, "_draw_scene", lambda: drawn.append(draw()) or drawn[-1])
    monkeypatch.setattr(scenes, "SCENE_S", 1000.0)
    with known() as (url, _, _):
        for site in ("cross-site", "same-site"):
            assert get(f"{url}/page/scene", headers={"Sec-Fetch-Site": site}).status_code == 403
        assert drawn == []
        own = [get(f"{url}/page/scene", headers={"Sec-Fetch-Site": "same-origin"}) for _ in range(5)]
        assert get(f"{url}/page/scene").json()["questions"]
    assert {reply.status_code for reply in own} == {200}
    assert own[0].json()["picture"].startswith("data:image/png;base64,")
    assert len(drawn) == 1


def test_a_scene_of_the_page_comes_with_questions_about_different_tags() -> None:
    for _ in range(20):
        shown = json.loads(scenes._draw_scene())
        scene = make_scene("test", int(shown["name"].removeprefix("scene ")))
        known_ones = {question.text: question for question in questions_of(scene)}
        asked = [known_ones[text].target for text in shown["questions"]]
        assert len(asked) == min(scenes.QUESTIONS, len(known_ones))
        assert len(set(asked[: len(scene.tags)])) == len(scene.tags) >= 2


# --- A server that ends while it is used ------------------------------------------------------------------------------

# Lists its model, has a child, and ends with the first question, as a server that runs out of memory does.
DYING = """
import http.server, json, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        said = json.dumps({"data": [{"id": "m", "owned_by": "visrl"}]}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(said))); self.end_headers()
        self.wfile.write(said)
    def do_POST(self):
        print("out of memory", child.pid, flush=True)
        os.kill(os.getpid(), 9)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_dies_under_its_requests_is_told_at_once_and_leaves_no_child(tmp_path: Path) -> None:
    """Without the five further attempts that another's server is given."""
    port, log, counts = free_port(), tmp_path / "log", Counter[str]()

    def ask() -> None:
        with served([sys.executable, "-c", DYING, str(port)], port, "m", log) as url:
            engine = EndpointEngine(Endpoint((url,), "m", first_wait_s=0.2))
            try:
                engine.complete([Conversation((Message("user", "Q?"),))] * 50, Sampling(), [[1]] * 50)
            finally:
                counts.update(engine.client.counts)
                engine.close()

    with pytest.raises(EndpointError, match=r"(?s)ended with status -9: .* is no more: .*out of memory"):
        ask()
    assert counts["gave up"] == 50
    assert counts.total() < 50 * 3
    assert not is_alive(int(re.findall(r"out of memory (\d+)", log.read_text())[0]))
    assert not has_ended(f"http://127.0.0.1:{port}/v1")  # it is nobody's any more
