"""The five command lines that users of the reference type, in their order, on the embedded model and the demo data."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import httpx
import pytest
from waiting import PATIENCE_S, wait_until

from visrl.cli import main
from visrl.engines.process import free_port
from visrl.models.tiny import CHECKPOINT

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def in_this_process(*words: str) -> None:
    """What the installed program `words[0]` runs, without the start of another process."""
    (program,) = entry_points(group="console_scripts", name=words[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(words))
        with pytest.raises(SystemExit) as end:
            program.load()()
    assert end.value.code == 0


def as_typed(*words: str) -> None:
    done = subprocess.run([str(BIN / words[0]), *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("run", [in_this_process, pytest.param(as_typed, marks=pytest.mark.slow)])
def test_train_twice_in_stages_merge_and_serve(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    model, few = f"model_name_or_path={CHECKPOINT}", "max_steps=1"
    sft, one, two = (f"output_dir={tmp_path / name}" for name in ("sft", "one", "two"))
    run("visrl-cli", "train", "configs/train_sft.yaml", model, few, sft)
    run("visrl-cli", "train", "configs/train_rl.yaml", model, few, one)
    run("visrl-cli-stage2", "train", "configs/train_rl.yaml", model, few, two)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert [(told["config"]["rl_stage"], told["steps"]) for told in manifests] == [(1, 1), (2, 1)]
    merged = tmp_path / "merged"
    run(
        "visrl-cli", "export", "configs/merge_lora.yaml", model, f"adapter_name_or_path={tmp_path / 'two'}",
        f"export_dir={merged}",
    )  # fmt: skip
    serve_and_ask(merged)


def test_the_readme_shows_these_five_lines() -> None:
    """Those that are run above, so that the README cannot drift from them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [line.split("#")[0].strip() for line in text.splitlines() if "visrl-cli" in line and "configs/" in line]
    assert shown == [
        "visrl-cli train configs/train_sft.yaml",
        "visrl-cli train configs/train_rl.yaml",
        "visrl-cli-stage2 train configs/train_rl.yaml",
        "visrl-cli export configs/merge_lora.yaml",
        "API_PORT=8000 visrl-cli api configs/infer.yaml",
    ]


def serve_and_ask(checkpoint: Path) -> None:
    port = free_port()
    server = subprocess.Popen(
        [str(BIN / "visrl-cli"), "api", "configs/infer.yaml", f"model_name_or_path={checkpoint}"],
        cwd=ROOT,
        env={**os.environ, "API_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: server.poll() is not None or is_healthy(port))
        assert server.poll() is None, "the server ended"
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=PATIENCE_S).json()
        assert checkpoint.name in {entry["id"] for entry in models["data"]}
    finally:
        server.send_signal(signal.SIGTERM)
        # uvicorn finishes what is in work, then lets the signal have its way.
        assert server.wait(PATIENCE_S) in (0, -signal.SIGTERM)


def is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.HTTPError:  # not up yet
        return False


def test_bad_input_is_one_sentence_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    model = f"model_name_or_path={CHECKPOINT}"
    shutil.copytree(CHECKPOINT, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"\x00" * 64)
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "image": "none.png", "question": "Q?", "answer": "1"}\n')
    out = f"output_dir={tmp_path / 'out'}"
    cases = [
        (["train", "configs/tiny/train_rl.yaml", "pref_beat=1"], "did you mean 'pref_beta'"),
        (["train", "configs/none.yaml"], "no config at"),
        (["train", "configs/train_rl.yaml", f"model_name_or_path={tmp_path / 'broken'}", out], "cannot be loaded"),
        (["train", "configs/train_rl.yaml", model, f"{out}2", "dataset=demo_rl_dat"], "no data 'demo_rl_dat'"),
        (["export", "configs/merge_lora.yaml", model, f"adapter_name_or_path={tmp_path}"], "holds no adapter"),
        (["data", "check", "--from", "viscot", str(tmp_path / "no.json")], "no.json"),
        (["report", str(tmp_path / "nowhere")], "nowhere"),
    ]
    for words, wanted in cases:
        status, said = ended(words, capsys)
        assert status != 0, words
        assert wanted in said.replace("\n", " "), (words, said)
        assert said.count("\n") < 10, (words, said)
    # A missing picture is a counted record, not an end.
    given = [model, f"dataset={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'generated'}", "rounds=1"]
    given += [f"critic_model_name_or_path={CHECKPOINT}"]  # its own base is not shipped
    assert ended(["generate", *given], capsys)[0] == 0
    tried = [json.loads(line) for line in (tmp_path / "generated" / "trajectories.jsonl").read_text().splitlines()]
    assert len(tried) == 2
    assert all("none.png" in row["error"] for row in tried)


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status and the standard error of a command; an exception that is none of its own would fail the test."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0), capsys.readouterr().err
