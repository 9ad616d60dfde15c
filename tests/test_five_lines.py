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
from visrl.engines.server_process import free_port
from visrl.models.tiny import CHECKPOINT

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LINES = [
    "visrl-cli train configs/train_sft.yaml",
    "visrl-cli train configs/train_rl.yaml",
    "visrl-cli-stage2 train configs/train_rl.yaml",
    "visrl-cli export configs/merge_lora.yaml",
    "API_PORT=8000 visrl-cli api configs/infer.yaml",
]


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
def test_the_five_lines_run_one_after_another(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the README has them, in a folder of their own; only the model is another, and the steps are few."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    model, few = f"model_name_or_path={CHECKPOINT}", "max_steps=2"
    for line in LINES[:3]:
        run(*line.split(), model, few)
    run(*LINES[3].split(), model)
    manifests = {
        name: json.loads((tmp_path / "runs" / name / "manifest.json").read_text())
        for name in ("sft", "stage1", "stage2", "merged")
    }
    assert [manifests[name]["steps"] for name in ("sft", "stage1", "stage2")] == [2, 2, 2]
    assert [manifests[name]["config"]["rl_stage"] for name in ("stage1", "stage2")] == [1, 2]
    merged = {name: [one["path"] for one in manifest["adapters"]] for name, manifest in manifests.items()}
    assert merged == {
        "sft": [], "stage1": ["runs/sft"], "stage2": ["runs/sft", "runs/stage1"],
        "merged": ["runs/sft", "runs/stage1", "runs/stage2"],
    }  # fmt: skip
    run(*LINES[1].split(), model, few)  # again: complete, though overwrite_output_dir is true
    assert json.loads((tmp_path / "runs" / "stage1" / "manifest.json").read_text()) == manifests["stage1"]
    serve_and_ask(tmp_path, LINES[4])


def test_what_the_next_stage_stands_on_must_be_what_it_was_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    model, few = f"model_name_or_path={CHECKPOINT}", "max_steps=2"
    status, said = ended(["train", "configs/train_rl.yaml", model, few], capsys)
    assert (status, "no adapter at runs/sft" in said) == (1, True)
    assert not (tmp_path / "runs").exists()
    in_this_process(*LINES[0].split(), model, few)
    in_this_process(*LINES[1].split(), model, few)
    # Another warm-up in the same folder, as overwrite_output_dir allows: stage 1 no longer stands on it.
    (tmp_path / "runs" / "sft" / "notes.txt").write_text("mine")
    in_this_process(*LINES[0].split(), model, few, "learning_rate=1e-3")
    assert (tmp_path / "runs" / "sft" / "notes.txt").read_text() == "mine"
    status, said = ended(["train", "configs/train_rl.yaml", "rl_stage=2", model, few], capsys)
    assert (status, "runs/sft, which has changed since" in said) == (1, True)


def test_the_readme_shows_these_five_lines() -> None:
    """Those that are run above, so that the README cannot drift from them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [line.split("#")[0].strip() for line in text.splitlines() if "visrl-cli" in line and "configs/" in line]
    assert shown == LINES


def serve_and_ask(folder: Path, line: str) -> None:
    variable, program, *words = line.split()
    port = free_port()
    server = subprocess.Popen(
        [str(BIN / program), *words],
        cwd=folder,
        env={**os.environ, variable.partition("=")[0]: str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: server.poll() is not None or is_healthy(port))
        assert server.poll() is None, "the server ended"
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=PATIENCE_S).json()
        assert "merged" in {entry["id"] for entry in models["data"]}
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
    row = '{{"id": "{0}", "image": "{0}", "question": "Q?", "answer": "1"}}\n'
    pictures = ("none.png", "scene:test/1", "scene:test/2")
    (tmp_path / "rows.jsonl").write_text("".join(map(row.format, pictures)))
    out = f"output_dir={tmp_path / 'out'}"
    cases = [
        (["train", "configs/tiny/train_rl.yaml", "pref_beat=1"], "did you mean 'pref_beta'"),
        (["train", "configs/none.yaml"], "no config at"),
        (["train", "configs/train_sft.yaml", f"model_name_or_path={tmp_path / 'broken'}", out], "cannot be loaded"),
        (["train", "configs/train_sft.yaml", model, f"{out}2", "dataset=demo_rl_dat"], "no data 'demo_rl_dat'"),
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
    given += [f"critic_model_name_or_path={CHECKPOINT}", "max_failed=0.5"]  # its own base is not shipped
    assert ended(["generate", *given], capsys)[0] == 0
    tried = [json.loads(line) for line in (tmp_path / "generated" / "trajectories.jsonl").read_text().splitlines()]
    assert len(tried) == 6
    assert sum("none.png" in (row["error"] or "") for row in tried) == 2


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The status and the standard error of a command; an exception that is none of its own would fail the test."""
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0), capsys.readouterr().err
