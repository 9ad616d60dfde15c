"""Greedy boxes and answers of a real vLLM are those of this process in fp32, wherever a verb asks one: `policy_url`,
`infer_backend: vllm` and `server: vllm`; of the embedded model and of random ones of three families.

A random model writes no box, so whatever it writes is read as one here: each text has a crop of its own.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from serve_help import body, data_url, post, serving
from test_rollout_servers import read_lines
from vllm_here import ARGUMENTS, NAME, START_S, checkpoint, needs_vllm, vllm_on_path, vllm_serving

from visrl.box import Box, BoxError, Size
from visrl.codecs import CODECS, Codec
from visrl.engines.local import LocalEngine
from visrl.engines.open import PolicyConfig, opened_policy
from visrl.evolve.config import GenerateConfig, ServerConfig
from visrl.evolve.generate import generate
from visrl.evolve.serving import generate_served
from visrl.records import Trajectory
from visrl.rollout.protocols import VISRL
from visrl.rollout.rollout import RolloutSettings, roll_out
from visrl.scenes import draw_ref, scene_samples
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.runner import make_backend

pytestmark = needs_vllm
QUESTIONS = 30
GREEDY = RolloutSettings(rounds=1, temperature=0.0, diversity=False)


class AnyText(Codec):
    """A codec that reads a box in every text: the family's own, else one that the text's hash names."""

    def parse(self, text: str, original: Size, processed: Size) -> Box:
        try:
            return Codec.parse(self, text, original, processed)
        except BoxError:
            x, y, width, height = (byte / 255 for byte in hashlib.blake2b(text.encode(), digest_size=4).digest())
            return Box(0.6 * x, 0.6 * y, 0.6 * x + 0.1 + 0.3 * width, 0.6 * y + 0.1 + 0.3 * height)


@pytest.fixture(scope="module", autouse=True)
def texts_are_boxes() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, codec in CODECS.items():
            patch.setitem(CODECS, name, AnyText(**{field.name: getattr(codec, field.name) for field in fields(codec)}))
        yield


@dataclass(frozen=True)
class Served:
    """A checkpoint, what it says in this process, and where vLLM serves it."""

    model: str
    here: list[Trajectory]
    url: str


@pytest.fixture(scope="module", params=["embedded", "qwen2_5_vl", "qwen3_vl", "internvl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoint(request.param, folder / "model")
    here = roll_out(LocalEngine.load(model), scene_samples("test", 0, QUESTIONS), GREEDY)[::2]
    with vllm_serving(model, folder / "log") as url:
        yield Served(str(model), here, url)


def said(trajectories: Sequence[Trajectory]) -> list[tuple[Any, ...]]:
    return [(one.box_text, one.box, one.answer, one.error) for one in trajectories]


def test_policy_url(family: Served) -> None:
    config = PolicyConfig(model_name_or_path=family.model, policy_url=(family.url,), policy_served_name=NAME)
    with opened_policy(config) as opened:
        there = roll_out(opened.policy, scene_samples("test", 0, QUESTIONS), GREEDY)[::2]
    assert said(there) == said(family.here)
    assert len({one.box_text for one in there}) > 10
    assert all(one.answer for one in there)


def test_infer_backend_vllm(family: Served) -> None:
    """Our server in front of it, asked as a client asks."""
    metrics = Metrics()
    config = ServeConfig(model_name_or_path=family.model, infer_backend="vllm", vllm_url=family.url, vllm_model=NAME)
    found = []
    with serving(make_backend(config, metrics), metrics, name="front") as url:
        for sample in scene_samples("test", 0, QUESTIONS):
            buffer = io.BytesIO()
            draw_ref(sample.image).save(buffer, "PNG")
            wanted = {"model": "front:focus", "temperature": 0, "max_tokens": VISRL.answer_tokens}
            asked = body(sample.question, [data_url(buffer.getvalue())], **wanted)
            message = post(url, asked).json()["choices"][0]["message"]
            found.append((message["focus"]["box_text"], message["content"]))
    assert found == [(one.box_text, one.answer) for one in family.here]


@pytest.mark.parametrize("name", ["embedded", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_server_vllm(name: str, tmp_path: Path) -> None:
    """What `evolve` does with `server: vllm`: vLLM is started for the generation."""
    model = checkpoint(name, tmp_path / "model")
    given: dict[str, Any] = {
        "model_name_or_path": str(model), "dataset": f"scenes:preference@1/0+{QUESTIONS}", "rounds": 1,
        "temperature": 0.0, "diversity": False,
    }  # fmt: skip
    generate(GenerateConfig(output_dir=tmp_path / "here", **given))
    server = ServerConfig(server="vllm", server_args=ARGUMENTS, server_start_s=START_S)
    with vllm_on_path():
        generate_served(GenerateConfig(output_dir=tmp_path / "there", **given), server)
    here, there = (read_lines(tmp_path / side / "trajectories.jsonl") for side in ("here", "there"))
    assert len(here) == 2 * QUESTIONS
    assert [{**row, "engine": ""} for row in there] == [{**row, "engine": ""} for row in here]
