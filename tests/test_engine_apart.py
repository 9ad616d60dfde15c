"""An engine leaves the model as it found it: what the model computes by itself, its attention and its modes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import groups_of, packed_of, talks
from test_train import config as train_config
from tiny_families import make
from torch import nn

from visrl.engines.base import Request, Sampling
from visrl.engines.local import LocalEngine
from visrl.models.attention import KINDS, attending_trees, use_tree_attention
from visrl.models.modes import evaluating
from visrl.models.parts import language_model
from visrl.packing.forward import token_logps
from visrl.train import trainer as training
from visrl.train.export import _logps
from visrl.train.run import train

FAMILIES = ["gemma3", "mllama", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"]


def attention_of(model: nn.Module) -> tuple[Any, ...]:
    """How each part of a model attends, by its config."""
    whole: Any = model
    return tuple(module.config._attn_implementation for module in whole.modules() if hasattr(module, "config"))


def own_forward(model: Any, encoder: Any) -> torch.Tensor:
    """What the model computes of a prompt without any of our masks."""
    path = encoder.encode(talks(1, 1)[0][0], [None])[0]
    ids = torch.from_numpy(path.ids)[None]
    with torch.no_grad():
        return language_model(model)(input_ids=ids, use_cache=False).last_hidden_state


@pytest.mark.parametrize("name", FAMILIES)
def test_a_used_engine_leaves_the_models_own_forward_to_the_bit(name: str) -> None:
    model, encoder = make(name)
    attention, wanted = attention_of(model), own_forward(model, encoder)
    engine = LocalEngine(model, encoder)
    assert attention_of(model) == attention, "building an engine is enough"
    conversations = [talk for talk, _ in talks(1, 2)]
    first = engine.complete(conversations, Sampling(max_tokens=3), [[0]] * len(conversations))
    assert attention_of(model) == attention
    assert own_forward(model, encoder).equal(wanted)
    running = engine.begin()  # as a server has it: rows join between steps, and others use the model meanwhile
    done = running.add({0: Request(conversations[0], Sampling(max_tokens=3), 0)})
    while len(running):
        assert own_forward(model, encoder).equal(wanted)
        done |= running.step()
    assert done[0] == first[0][0]
    assert attention_of(model) == attention


def test_every_module_is_in_its_own_mode_afterwards() -> None:
    model, encoder = make("qwen2_vl")
    model.train()
    model.model.visual.eval()  # a frozen tower
    modes = [module.training for module in model.modules()]
    engine = LocalEngine(model, encoder)
    engine.complete([talks(1, 1)[0][0]], Sampling(max_tokens=2), [[0]])
    assert [module.training for module in model.modules()] == modes
    inside = []
    with pytest.raises(ZeroDivisionError), evaluating(model):
        inside += [module.training for module in model.modules()] + [1 / 0]
    with evaluating(model):
        inside += [module.training for module in model.modules()]
    assert not any(inside)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma3"])
def test_an_exception_inside_leaves_the_model_as_it_was(name: str) -> None:
    model, encoder = make(name)
    attention, wanted = attention_of(model), own_forward(model, encoder)
    engine = LocalEngine(model, encoder)
    inside = []

    def fails(*_: Any) -> None:
        inside.append(language_model(model).config._attn_implementation)
        raise RuntimeError("out of memory")

    hook = language_model(model).register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        engine.complete([talks(1, 1)[0][0]], Sampling(max_tokens=2), [[0]])
    hook.remove()
    assert inside == [KINDS["dense"]]
    assert attention_of(model) == attention
    assert own_forward(model, encoder).equal(wanted)
    with pytest.raises(KeyError), attending_trees(model, "no such kind"):
        pass
    assert attention_of(model) == attention


def test_contexts_nest_each_with_its_own_kind() -> None:
    model, _ = make("qwen2_vl")
    config = language_model(model).config
    own = config._attn_implementation
    with attending_trees(model, "blocks"):
        with attending_trees(model):
            assert config._attn_implementation == KINDS["dense"]
        assert config._attn_implementation == KINDS["blocks"]
    assert config._attn_implementation == own
    use_tree_attention(model, "blocks")  # a model in training keeps its kind, too
    with attending_trees(model):
        pass
    assert config._attn_implementation == KINDS["blocks"]


def test_the_probe_of_an_export_leaves_the_model_as_it_was() -> None:
    model, encoder = make("qwen2_vl")
    attention, wanted = attention_of(model), own_forward(model, encoder)
    packed = packed_of(encoder, groups_of(encoder)[0])
    logps = _logps(model, packed, encoder)
    assert attention_of(model) == attention
    assert own_forward(model, encoder).equal(wanted)
    use_tree_attention(model)
    with torch.no_grad():
        assert token_logps(model, packed).equal(logps)


def in_threads(work: list[Callable[[], Any]]) -> list[Any]:
    """What each piece of work returns, all at once."""
    results: list[Any] = [None] * len(work)

    def run(number: int) -> None:
        results[number] = work[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_engines_of_one_model_in_several_threads_do_not_mix_their_settings() -> None:
    model, encoder = make("qwen2_vl")
    attention, wanted = attention_of(model), own_forward(model, encoder)
    talk = talks(1, 1)[0][0]
    rows = [Request(talk, Sampling(1.0, max_tokens=12), seed) for seed in range(3)]
    alone = [LocalEngine(model, encoder).generate([row])[0] for row in rows]
    engines = [LocalEngine(model, encoder) for _ in rows]
    works = [lambda n=n: [engines[n].generate([rows[n]])[0] for _ in range(3)] for n in range(len(rows))]
    assert in_threads(works) == [[text] * 3 for text in alone]
    assert attention_of(model) == attention
    assert own_forward(model, encoder).equal(wanted)


def test_rollouts_in_training_leave_the_trainer_its_attention(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    own = training.VisrlTrainer._roll_out

    def watched(self: Any) -> Any:
        config = language_model(self.model).config
        before = config._attn_implementation
        measures = own(self)
        seen.append((before, config._attn_implementation))
        return measures

    monkeypatch.setattr(training.VisrlTrainer, "_roll_out", watched)
    given = {"stage": "dpo", "rl_stage": 2, "dataset": "demo_rl_data_stage2", "max_samples": 2}
    rollouts = {"rollout_samples": 1, "rollout_dataset": "scenes:validation/0+8", "eval_strategy": "epoch"}
    train(train_config(tiny, tmp_path / "out", attention="blocks", **given, **rollouts))
    assert seen == [(KINDS["blocks"], KINDS["blocks"])]
