"""Adapters loaded while the server runs: what is sampled under them, what is refused, and what a batch holds."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serve_help import body, get, known, post, serving
from waiting import PATIENCE_S

from visrl.config import ConfigError
from visrl.conversation import Conversation, Message, focus_conversation, image_view
from visrl.engines.base import Sampling
from visrl.engines.client import Client
from visrl.engines.endpoint import EndpointEngine
from visrl.engines.local import LocalEngine
from visrl.engines.openai_server import Endpoint, EndpointError
from visrl.models.adapters import WEIGHTS, read_adapter
from visrl.models.load import load_model
from visrl.models.tiny import CHECKPOINT
from visrl.records import Picture
from visrl.scenes import draw_ref, scene_samples
from visrl.serve.admission import AdmissionQueue
from visrl.serve.config import ServeConfig
from visrl.serve.metrics import Metrics
from visrl.serve.requests import PendingRequest, QueuedRequest
from visrl.serve.runner import make_backend, runtime_adapters, serve
from visrl.train.model import lora_targets

SAMPLING = Sampling(temperature=1.0, max_tokens=12, logprobs=True)


def write_adapter(folder: Path, seed: int, rank: int = 4) -> Path:
    """A LoRA adapter of the embedded model that changes much."""
    from peft import LoraConfig, get_peft_model

    model = load_model(CHECKPOINT)
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=lora_targets(model, "all")))
    with torch.no_grad():
        for name, weights in wrapped.named_parameters():
            if "lora_B" in name:
                weights.normal_(0, 0.3)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where adapters lie: two of the model, and some that are none."""
    folder = tmp_path_factory.mktemp("adapters")
    write_adapter(folder / "one", 1)
    write_adapter(folder / "two", 2, rank=2)
    shutil.copytree(folder / "one", folder / "pickled")
    (folder / "pickled" / WEIGHTS).rename(folder / "pickled" / "adapter_model.bin")
    shutil.copytree(folder / "one", folder / "other")
    config = folder / "other" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    (folder / "link").symlink_to(CHECKPOINT)
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    config = ServeConfig(
        model_name_or_path=str(CHECKPOINT), served_model_name="tiny", runtime_lora_folder=folder, max_loras=2,
        max_lora_bytes=400_000,
    )  # fmt: skip
    metrics = Metrics()
    with serving(make_backend(config, metrics), metrics, name="tiny", adapters=runtime_adapters(config)) as url:
        yield url


def load(url: str, name: str, path: str | Path, **more: Any) -> httpx.Response:
    asked = {"lora_name": name, "lora_path": str(path), **more}
    return httpx.post(f"{url}/v1/load_lora_adapter", json=asked, timeout=PATIENCE_S)


def unload(url: str, name: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=PATIENCE_S)


def talks(count: int = 3) -> list[Conversation]:
    return [
        focus_conversation(sample.question, image_view(Picture(sample.image), draw_ref(sample.image)))
        for sample in scene_samples("test", 0, count)
    ]


def test_what_is_sampled_under_an_adapter_is_what_this_process_samples(server: str, folder: Path) -> None:
    """Texts, tokens and log-probabilities, of two adapters and of the model itself, asked for all at once."""
    local, seeds = LocalEngine.load(CHECKPOINT), [[1, 2], [3, 4], [5, 6]]
    engine = EndpointEngine(Endpoint((f"{server}/v1",), "tiny", concurrency=16), local.codec, local.encoder)
    engine.check()
    expected, found = {}, {}
    for name in ("one", "two", None):
        local.use_adapter(read_adapter(folder / name) if name else None)
        expected[name] = local.complete(talks(), SAMPLING, seeds)
        if name:
            engine.client.load_adapter(name, folder / name)
    assert engine.client.adapters() == {"one", "two"}
    for name in expected:
        engine.adapter = name
        found[name] = engine.complete(talks(), SAMPLING, seeds)
    for name, own in expected.items():
        for one, other in zip((c for row in own for c in row), (c for row in found[name] for c in row), strict=True):
            assert replace(one, logps=()) == replace(other, logps=(), prompt_ids=())
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
    texts = {name: [c.text for row in own for c in row] for name, own in expected.items()}
    assert texts["one"] != texts["two"] != texts[None] != texts["one"]
    assert engine.client.unload_adapter("one")
    assert not engine.client.unload_adapter("one")
    engine.adapter = "one"
    (gone,), *_ = engine.complete(talks(1), SAMPLING, [[1]])
    assert "no model 'one' here, but tiny, two" in str(gone.error)
    engine.client.unload_adapter("two")
    engine.close()


def test_tokens_are_told_as_vllm_tells_them(server: str) -> None:
    local = LocalEngine.load(CHECKPOINT)
    plain = post(server, body(model="tiny", max_tokens=5)).json()
    assert "prompt_token_ids" not in plain
    assert plain["choices"][0]["logprobs"] is None
    told = {"logprobs": True, "top_logprobs": 0, "return_token_ids": True, "n": 2, "temperature": 1.0, "seed": 3}
    reply = post(server, body(model="tiny", max_tokens=5) | told).json()
    assert len(reply["prompt_token_ids"]) == reply["usage"]["prompt_tokens"]
    assert reply["prompt_token_ids"].count(local.encoder.image_token_id) > 1
    for choice in reply["choices"]:
        content = choice["logprobs"]["content"]
        assert len(choice["token_ids"]) == len(content) > 0
        assert all(token["logprob"] < 0 and token["top_logprobs"] == [] for token in content)
        assert "".join(token["token"] for token in content).startswith(choice["message"]["content"])


@pytest.mark.parametrize(("fields", "told"), [
    ({"logprobs": True, "stream": True}, "logprobs is not supported by this request; a stream holds none"),
    ({"return_token_ids": True, "model": "tiny:focus"}, "samples two texts"),
    ({"logprobs": True, "top_logprobs": 3}, "top_logprobs is not supported"),
])  # fmt: skip
def test_tokens_that_cannot_be_told_are_refused(server: str, fields: dict[str, Any], told: str) -> None:
    reply = post(server, body(model="tiny") | fields)
    assert reply.status_code == 400
    assert told in reply.json()["error"]["message"]


@pytest.mark.parametrize(("name", "path", "more", "told"), [
    ("x", "/etc", {}, "adapters are read from below"),
    ("x", "../adapters-of-others", {}, "adapters are read from below"),
    ("x", "link", {}, "adapters are read from below"),
    ("x", "nowhere", {}, "there is no folder nowhere"),
    ("x", "empty", {}, "holds no adapter"),
    ("x", "pickled", {}, "a pickle, which could run anything"),
    ("x", "other", {}, "have another shape"),
    ("x y", "one", {}, "make a name"),
    ("tiny", "one", {}, "conflicts with a served base model"),
    ("x", "one", {"is_3d_lora_weight": True}, "is_3d_lora_weight"),
    ("x", "one", {"rank": 3}, "rank: Extra inputs"),
    ("", "one", {}, "lora_name"),
    ("x", "a\0b", {}, "NUL"),
])  # fmt: skip
def test_what_is_no_adapter_of_this_server_is_refused(
    server: str, name: str, path: str, more: dict[str, Any], told: str
) -> None:
    reply = load(server, name, path, **more)
    assert reply.status_code in (400, 404), reply.text
    assert told in reply.json()["error"]["message"]
    assert [model["id"] for model in get(f"{server}/v1/models").json()["data"]] == ["tiny", "tiny:focus", "tiny:whole"]


def test_adapters_are_bounded_in_number_and_size(server: str, folder: Path) -> None:
    assert load(server, "a", "one").text == "Success: LoRA adapter 'a' added successfully."
    listed = get(f"{server}/v1/models").json()["data"][-1]
    assert (listed["id"], listed["parent"], listed["root"]) == ("a", "tiny", str(folder / "one"))
    assert "already been loaded" in load(server, "a", "two").json()["error"]["message"]
    assert load(server, "a", "two", load_inplace=True).status_code == 200
    assert load(server, "b", "one").status_code == 200
    assert "as many as may be (max_loras)" in load(server, "c", "one").json()["error"]["message"]
    assert unload(server, "a").text == "Success: LoRA adapter 'a' removed successfully."
    assert unload(server, "a").status_code == 404
    large = write_adapter(folder / "large", 3, rank=64)
    assert "(max_lora_bytes)" in load(server, "c", large).json()["error"]["message"]
    shutil.rmtree(large)
    assert unload(server, "b").status_code == 200


def test_the_end_points_are_off_unless_a_folder_is_named(tmp_path: Path) -> None:
    with known() as (url, _, _):
        for reply in (load(url, "x", "/etc"), unload(url, "x")):
            assert reply.status_code == 404
            assert "runtime_lora_folder" in reply.json()["error"]["message"]
        client = Client(Endpoint((f"{url}/v1",), "known"))
        with pytest.raises(EndpointError, match="loads no adapters at run time"):
            client.load_adapter("an-adapter", tmp_path)
        with pytest.raises(EndpointError, match=r"loads no adapters at run time.*VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
            client.unload_adapter("an-adapter")
        client.close()


@pytest.mark.parametrize(("keys", "told"), [
    ({"max_loras": 2}, "max_loras: no adapters are loaded; set runtime_lora_folder"),
    ({"runtime_lora_folder": "/no/such/folder"}, "is no folder"),
    ({"runtime_lora_folder": "/", "infer_backend": "vllm"}, "loaded at the vLLM server itself"),
])  # fmt: skip
def test_keys_that_would_have_no_effect_are_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        serve(model_name_or_path=str(CHECKPOINT), port=0, **keys)


def test_a_batch_has_one_adapter_and_each_gets_its_turn(folder: Path) -> None:
    import asyncio

    loop, queue = asyncio.new_event_loop(), AdmissionQueue(max_batch=8, max_waiting=99)
    one, two = read_adapter(folder / "one"), read_adapter(folder / "two")

    def put(adapter: Any) -> PendingRequest:
        asked = QueuedRequest(Conversation((Message("user", "?"),)), Sampling(), 0, adapter=adapter)
        pending = PendingRequest(asked, loop, loop.create_future(), length=10)
        queue.admit(asked)
        queue.put(pending)
        pending.ready_at = 0.0  # long ago
        return pending

    waiting = [put(adapter) for adapter in (None, one, None, two)]
    assert queue.take([]) == [waiting[0], waiting[2]]
    late = put(None)
    assert queue.take(waiting[:1]) == []  # the one that waits longest wants another
    assert queue.take([]) == [waiting[1]]
    assert queue.take([]) == [waiting[3]]
    assert queue.take([]) == [late]
    loop.close()
