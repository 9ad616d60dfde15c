"""lmms-eval itself, in the environment that `make lmms-env` makes, asks our server: its scores are ours.

Without that environment these are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_help import serving

from visrl.evaluate.config import EvalConfig
from visrl.evaluate.run import evaluate
from visrl.evaluate.toolkits import score_toolkit
from visrl.models.tiny import CHECKPOINT
from visrl.records import read_jsonl
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend

ROOT = Path(__file__).parents[1]
BIN = Path(os.environ.get("VISRL_LMMS", ROOT / ".venv-lmms")) / "bin"
TASK = ROOT / "benchmarks" / "lmms_eval"
SCENES = "scenes:test/0+12*2"
MODES = {"tiny:focus": "own", "tiny:whole": "no_crop", "tiny": "no_box"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "lmms-eval").is_file(), reason=f"no lmms-eval at {BIN}; `make lmms-env` installs it"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    config, metrics = ServeConfig(model_name_or_path=str(CHECKPOINT), served_model_name="tiny"), Metrics()
    with serving(make_backend(config, metrics), metrics, name="tiny") as url:
        yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where lmms-eval starts: beside the questions."""
    folder = tmp_path_factory.mktemp("lmms")
    subprocess.run([sys.executable, str(TASK / "draw.py"), SCENES, "questions.parquet"], cwd=folder, check=True)
    return folder


def ask(folder: Path, server: str, model: str) -> tuple[float, list[dict[str, Any]], Path]:
    """What lmms-eval makes of a model: its score, its samples, and the file of them."""
    out = folder / model.replace(":", "-")
    command = [
        str(BIN / "lmms-eval"), "--model", "openai", "--model_args", f"model={model},base_url={server}/v1,timeout=600",
        "--include_path", str(TASK), "--tasks", "visrl_scenes", "--log_samples", "--output_path", str(out),
    ]  # fmt: skip
    surroundings = os.environ | {"OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    ended = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (results,), (samples,) = out.rglob("*_results.json"), out.rglob("*_samples_visrl_scenes.jsonl")
    score = json.loads(results.read_text())["results"]["visrl_scenes"]["exact_match,none"]
    return score, list(read_jsonl(samples)), samples


@pytest.mark.parametrize("model", MODES)
def test_the_score_and_every_text_are_those_of_our_own_evaluation(model, server, folder, tmp_path):
    score, samples, file = ask(folder, server, model)
    evaluate(EvalConfig(
        model_name_or_path=str(CHECKPOINT), dataset=SCENES, mode=MODES[model], output_dir=tmp_path / "eval",
    ))  # fmt: skip
    rows = list(read_jsonl(tmp_path / "eval" / "results.jsonl"))
    assert len(samples) == len(rows) == 24
    assert [row["filtered_resps"] for row in samples] == [row["prediction"] for row in rows]
    assert score == pytest.approx(sum(row["exact"] for row in rows) / 24)
    scored = score_toolkit(file, "lmms-eval")
    assert [row["exact"] for row in scored.rows] == [row["exact"] for row in rows]
    assert scored.logged["visrl_scenes"]["exact_match"] == {"n": 24, "mean": score}
