"""A real vLLM on this machine, in the environment that `make vllm-env` makes: token ids and log-probabilities as in
this process, and adapters that are loaded while it runs. Without that environment these are skipped.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_rollout_servers import config, read_lines
from test_serve_adapters import talks, write_adapter
from vllm_here import BIN, NAME, needs_vllm, vllm_serving

from visrl.engines.base import Sampling
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.local import LocalEngine
from visrl.engines.openai_server import Endpoint
from visrl.models.adapters import read_adapter
from visrl.models.tiny import CHECKPOINT
from visrl.train.run import train

pytestmark = needs_vllm
LORA = ["--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with vllm_serving(CHECKPOINT, tmp_path_factory.mktemp("vllm") / "log", LORA) as url:
        yield url


def test_tokens_and_log_probabilities_of_the_model_and_of_adapters_loaded_at_run_time(
    server: str, tmp_path: Path
) -> None:
    """Greedy, and at a temperature, under two adapters one after another and the model itself after them."""
    local = LocalEngine.load(CHECKPOINT)
    engine = EndpointEngine(Endpoint((server,), NAME, concurrency=8), local.codec, local.encoder)
    engine.check()
    asked, seeds = talks(6), [[1]] * 6
    for name, seed in (("one", 1), ("two", 2), (None, 0)):
        if name:
            engine.client.load_adapter(name, write_adapter(tmp_path / name, seed))
            assert engine.client.adapters() == {name}
        engine.adapter = name
        local.use_adapter(read_adapter(tmp_path / name) if name else None)
        for temperature in (0.0, 0.7):
            sampling = Sampling(temperature, max_tokens=20, logprobs=True, prompt_ids=True)
            for (here,), (there,) in zip(
                local.complete(asked, sampling, seeds), engine.complete(asked, sampling, seeds), strict=True
            ):
                assert there.error is None
                assert there.prompt_ids == here.prompt_ids
                assert len(there.ids) == len(there.logps) > 0
                if not temperature:
                    assert (there.text, there.ids) == (here.text, here.ids)
                    assert there.logps == pytest.approx(here.logps, abs=1e-3)
        if name:
            assert engine.client.unload_adapter(name)
    engine.close()


def test_online_steps_with_adapters_loaded_at_run_time(server: str, tmp_path: Path) -> None:
    """vLLM draws other numbers for a seed, so nearly greedy: the same texts, and the weights of this process."""
    given = {"max_steps": 3, "temperature": 0.05, "num_answers": 1, "rewards": ["iou"], "learning_rate": 0.1}
    names = {"rollout_url": server, "rollout_served_name": NAME, "vllm_importance_sampling_mode": "token_truncate"}
    out = train(config(tmp_path / "out", **given, **names))
    rows = [row for row in read_lines(out / "log.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        assert row["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=0.02)
        assert row["box/parsed"] > 0.5
    warm = train(config(tmp_path / "warm", **{**given, "temperature": 1.0, "num_answers": 2}, **names))
    rows = [row for row in read_lines(warm / "log.jsonl") if "loss" in row]
    assert all(row["sampling/logp_difference"] < 1e-2 for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)


def test_the_environment_names_what_goes_together() -> None:
    told = subprocess.run(
        [BIN / "python", "-c", "import torch, torchvision, transformers; from importlib.metadata import version as v; "
         "print(v('vllm'), torch.__version__.split('+')[0], transformers.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert told == ["0.32.0+cpu", "2.13.0", "5.19.0"]
