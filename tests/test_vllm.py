"""A real vLLM on this machine, in the environment that `make vllm-env` makes: boxes and answers as in this process in
fp32, in every place that speaks to a server, and adapters that are loaded while it runs.

Without that environment these are skipped. One server at a time: each holds a gigabyte of key-value cache.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from serve_help import body, data_url, post
from test_rollout_servers import config, read_lines
from test_serve_adapters import talks, write_adapter
from waiting import wait_until

from visrl.engines.base import Sampling
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.local import LocalEngine
from visrl.engines.openai_server import Endpoint
from visrl.engines.server_process import free_port, served, vllm_command
from visrl.evolve.config import GenerateConfig
from visrl.evolve.generate import generate
from visrl.models.adapters import read_adapter
from visrl.models.load import load_encoder
from visrl.models.tiny import CHECKPOINT
from visrl.records import Sample
from visrl.rollout.rollout import RolloutSettings, roll_out
from visrl.scenes import draw_ref, scene_samples
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend
from visrl.train.run import train

BIN = Path(os.environ.get("VISRL_VLLM", Path(__file__).parents[1] / ".venv-vllm")) / "bin"
ARGUMENTS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
LORA = ["--enable-lora", "--max-lora-rank", "16", "--logprobs-mode", "processed_logprobs"]
SURROUNDINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip
START_S = 900.0
GREEDY = RolloutSettings(rounds=1, temperature=0.0, diversity=False)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "vllm").is_file(), reason=f"no vLLM at {BIN}; `make vllm-env` installs one"),
]


@pytest.fixture(scope="module", autouse=True)
def surroundings() -> Iterator[None]:
    """`vllm` is the one of that environment, for whatever starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
        for name, value in SURROUNDINGS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    command = vllm_command(
        str(CHECKPOINT), load_encoder(CHECKPOINT), port, served_name="base", max_images=2, more=[*ARGUMENTS, *LORA]
    )
    with served(command, port, "base", log, START_S) as url:
        yield url


@pytest.fixture(scope="module")
def local() -> LocalEngine:
    return LocalEngine.load(CHECKPOINT)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return scene_samples("test", 0, 30)


def said(trajectories: Sequence[Any]) -> list[tuple[str, Any, str | None]]:
    return [(one.box_text, one.box, one.answer) for one in trajectories]


def test_boxes_and_answers_are_those_of_this_process(server: str, local: LocalEngine, samples: list[Sample]) -> None:
    engine = EndpointEngine(Endpoint((server,), "base", concurrency=16), local.codec, local.encoder)
    engine.check()
    here, there = roll_out(local, samples, GREEDY), roll_out(engine, samples, GREEDY)
    assert said(there) == said(here)
    assert sum(one.answer is not None for one in here) > 25
    engine.close()


def test_tokens_and_log_probabilities_of_the_model_and_of_adapters_loaded_at_run_time(
    server: str, local: LocalEngine, tmp_path: Path
) -> None:
    """Greedy, and at a temperature, under two adapters one after another and the model itself after them."""
    engine = EndpointEngine(Endpoint((server,), "base", concurrency=8), local.codec, local.encoder)
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
    names = {"rollout_url": server, "rollout_served_name": "base", "vllm_importance_sampling_mode": "token_truncate"}
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


def test_generation_with_the_policy_behind_it(server: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "model_name_or_path": str(CHECKPOINT), "dataset": "scenes:preference@1/0+6", "rounds": 1,
        "temperature": 0.0, "diversity": False,
    }  # fmt: skip
    for name, more in (("here", {}), ("there", {"policy_url": (server,), "policy_served_name": "base"})):
        generate(GenerateConfig(output_dir=tmp_path / name, **given, **more))
    rows = [read_lines(tmp_path / name / "trajectories.jsonl") for name in ("here", "there")]
    assert [{**row, "engine": ""} for row in rows[0]] == [{**row, "engine": ""} for row in rows[1]]


def children_of_vllm() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "name"]):
        words = " ".join(process.info["cmdline"] or [process.info["name"] or ""])
        if str(BIN) in words or "VLLM::" in words:
            found.append(process)
    return found


def test_our_server_in_front_of_one_that_it_starts(local: LocalEngine, samples: list[Sample], server: str) -> None:
    """`infer_backend: vllm`, at a running server's address."""
    from serve_help import serving

    config_, metrics = (
        ServeConfig(model_name_or_path=str(CHECKPOINT), infer_backend="vllm", vllm_url=server, vllm_model="base"),
        Metrics(),
    )
    with serving(make_backend(config_, metrics), metrics, name="tiny") as url:
        for sample, here in zip(samples[:6], roll_out(local, samples[:6], GREEDY), strict=True):
            import io

            buffer = io.BytesIO()
            draw_ref(sample.image).save(buffer, "PNG")
            asked = body(sample.question, [data_url(buffer.getvalue())]) | {"model": "tiny:focus", "temperature": 0}
            message = post(url, asked).json()["choices"][0]["message"]
            assert (message["focus"]["box_text"], message["content"]) == (here.box_text, here.answer)


def test_the_loop_starts_its_own_and_leaves_no_orphan(tmp_path: Path) -> None:
    """`evolve` with `server: vllm`: started for the generation, stopped after it, its workers with it."""
    before = {process.pid for process in children_of_vllm()}
    from visrl.evolve.config import ServerConfig
    from visrl.evolve.serving import generate_served

    asked = GenerateConfig(
        model_name_or_path=str(CHECKPOINT), dataset="scenes:preference@1/0+4", rounds=1,
        output_dir=tmp_path / "generate",
    )  # fmt: skip
    generate_served(asked, ServerConfig(server="vllm", server_args=ARGUMENTS, server_start_s=START_S))
    assert len(read_lines(tmp_path / "generate" / "trajectories.jsonl")) == 8
    wait_until(lambda: not [one for one in children_of_vllm() if one.pid not in before], "no orphan")


def test_the_environment_names_what_goes_together() -> None:
    told = subprocess.run(
        [BIN / "python", "-c", "import torch, torchvision, transformers; from importlib.metadata import version as v; "
         "print(v('vllm'), torch.__version__.split('+')[0], transformers.__version__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert told == ["0.32.0+cpu", "2.13.0", "5.19.0"]
