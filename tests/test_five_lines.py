"""The five command lines that users of the reference type, in their order, on the embedded model and the demo data."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from visrl.models.tiny import CHECKPOINT

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(*words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(BIN / words[0]), *words[1:]], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_train_twice_in_stages_merge_and_serve(tmp_path):
    model, few = f"model_name_or_path={CHECKPOINT}", "max_steps=2"
    sft, one, two = (f"output_dir={tmp_path / name}" for name in ("sft", "one", "two"))
    run("visrl-cli", "train", "configs/train_sft.yaml", model, few, sft)
    run("visrl-cli", "train", "configs/train_rl.yaml", model, few, one)
    run("visrl-cli-stage2", "train", "configs/train_rl.yaml", model, few, two)
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert (manifest["config"]["rl_stage"], manifest["steps"]) == (2, 2)
    merged = tmp_path / "merged"
    told = run(
        "visrl-cli", "export", "configs/merge_lora.yaml", model, f"adapter_name_or_path={tmp_path / 'two'}",
        f"export_dir={merged}",
    )  # fmt: skip
    assert "deviate by at most" in told
    serve_and_ask(merged)


def serve_and_ask(checkpoint: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [str(BIN / "visrl-cli"), "api", "configs/infer.yaml", f"model_name_or_path={checkpoint}"],
        cwd=ROOT,
        env={**os.environ, "API_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
                    assert reply.status == 200
                    break
            except OSError:
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.2)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as reply:
            names = [entry["id"] for entry in json.load(reply)["data"]]
        assert checkpoint.name in names
    finally:
        server.send_signal(signal.SIGTERM)
        # uvicorn finishes what is in work, then lets the signal have its way.
        assert server.wait(timeout=30) in (0, -signal.SIGTERM)


def test_bad_input_is_one_sentence_and_no_traceback(tmp_path):
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
        done = subprocess.run([str(BIN / "visrl"), *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0, words
        assert wanted in done.stderr.replace("\n", " "), (words, done.stderr)
        assert "Traceback" not in done.stderr, (words, done.stderr)
    # A missing picture is a counted record, not an end.
    given = [model, f"dataset={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'generated'}", "rounds=1"]
    given += [f"critic_model_name_or_path={CHECKPOINT}"]  # its own base is not shipped
    done = subprocess.run([str(BIN / "visrl"), "generate", *given], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    tried = [json.loads(line) for line in (tmp_path / "generated" / "trajectories.jsonl").read_text().splitlines()]
    assert len(tried) == 2
    assert all("none.png" in row["error"] for row in tried)
