"""Image features kept over epochs give the log-probabilities and gradients of features made anew; a library that takes
none has them computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_families import gradients, groups_of, packed_of
from test_plain import opened
from test_train import log, preferences
from torch import Tensor, nn

from visrl.models.attention import use_tree_attention
from visrl.models.families import FAMILIES
from visrl.models.parts import base_model, language_model, vision_tower
from visrl.packing.forward import branch_logps
from visrl.train import run
from visrl.train.features import FeatureCache, open_features

CPU = torch.device("cpu")
KEEPING = sorted(name for name, family in FAMILIES.items() if family.keeps_features)
FOUND = [pytest.param(name, marks=pytest.mark.slow) for name in ("gemma4", "glm4v", "mistral3", "qwen3_vl_moe")]
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
takes_features = pytest.mark.skipif(RELEASE < (5, 18), reason="takes no ready-made features before 5.18")


def frozen(name: str) -> tuple[nn.Module, Any]:
    """A model of which the decoder alone is trained."""
    model, encoder = opened(name)
    use_tree_attention(model)
    model.requires_grad_(False)
    language_model(model).requires_grad_(True)
    return model, encoder


class Runs:
    """Counts the calls of a part of a model."""

    def __init__(self, part: nn.Module) -> None:
        self.count = 0
        part.register_forward_pre_hook(self._called)

    def _called(self, *_: Any) -> None:
        self.count += 1


def assert_same_gradients(mine: dict[str, Tensor], native: dict[str, Tensor]) -> None:
    assert mine.keys() == native.keys()
    whole = torch.cat([gradient.flatten() for gradient in native.values()]).norm()
    for key, gradient in native.items():
        assert (mine[key] - gradient).norm() < 1e-5 * max(gradient.norm(), 1e-3 * whole), key


@takes_features
@pytest.mark.parametrize("name", [*KEEPING, *FOUND])
def test_kept_features_change_nothing(name: str) -> None:
    model, encoder = frozen(name)
    groups = groups_of(encoder)[0]
    wanted = branch_logps(model, packed_of(encoder, groups)).sums
    made: Any = base_model(model).model.get_image_features(**groups[0][0].views[0].inputs, return_dict=True)
    tower = Runs(vision_tower(model))
    cache = FeatureCache(model, encoder.family, limit=10**9)
    assert FeatureCache.serves(model, encoder.family)
    seen = 0
    for epoch in range(2):
        packed = packed_of(encoder, groups)
        cache.fill(packed, CPU)
        packed = packed.to(CPU)  # as the trainer does
        assert not any(taken in call.inputs for call in packed.calls for taken in encoder.family.takes)
        given = [call.inputs["mm_encoder_outputs"]["image"] for call in packed.calls]
        assert all(type(features) is type(made) and features.to_tuple() for features in given)
        views = [view for call in packed_of(encoder, groups).calls for view in call.views]
        sums = branch_logps(model, packed).sums
        torch.testing.assert_close(sums, wanted, rtol=1e-6, atol=0)
        seen += len(views)
        distinct = {view.key for view in views}
        assert (cache.misses, cache.hits) == (len(distinct), seen - len(distinct)), epoch
        assert tower.count == len(distinct), "the tower ran for what was kept"
    mine, native = gradients(model, sums), gradients(model, branch_logps(model, packed_of(encoder, groups)).sums)
    assert_same_gradients(mine, native)


def without_argument(forward: Any) -> Any:
    """A forward that names no argument for ready-made features; what it does not name it passes on, as models do."""

    def older(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    return older


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
@pytest.mark.parametrize("name", KEEPING)
def test_a_library_that_takes_no_features_is_named_and_has_them_computed(
    name: str, inner: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The argument is missing in the model's forward, or in that of the part to which it passes everything on."""
    model, encoder = frozen(name)
    groups = groups_of(encoder)[0]
    wanted = branch_logps(model, packed_of(encoder, groups)).sums
    native = gradients(model, wanted)
    part: Any = model.model if inner else model
    part.__class__ = type("Older", (type(part),), {"forward": without_argument(type(part).forward)})
    assert open_features(model, encoder.family, limit=10**9) is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"features of pictures are computed in every step: {name} in transformers {transformers.__version__} takes "
        "none that are ready-made"
    )
    sums = branch_logps(model, packed_of(encoder, groups)).sums
    torch.testing.assert_close(sums, wanted, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, sums), native)
    with pytest.raises(AssertionError, match="would not look at features"):
        FeatureCache(model, encoder.family, limit=10**9)


@takes_features
def test_training_with_and_without_kept_features_ends_alike(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[FeatureCache | None] = []

    def opened(*given: Any) -> FeatureCache | None:
        caches.append(open_features(*given))
        return caches[-1]

    monkeypatch.setattr(run, "open_features", opened)
    options = {"max_samples": 4, "num_train_epochs": 2}
    kept = run.train(preferences(tiny, tmp_path / "kept", 2, **options))
    kind: Any = transformers.Qwen2VLForConditionalGeneration
    assert "takes none that are ready-made" not in capsys.readouterr().out
    monkeypatch.setattr(kind, "forward", without_argument(kind.forward))
    computed = run.train(preferences(tiny, tmp_path / "computed", 2, **options))
    assert capsys.readouterr().out.count("qwen2_vl in transformers") == 1
    assert caches[0] is not None
    assert caches[0].hits > caches[0].misses > 0
    assert caches[1] is None
    losses = [[row["loss"] for row in log(out) if "loss" in row] for out in (kept, computed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = (load_file(out / "adapter_model.safetensors") for out in (kept, computed))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-6) for key in one)


@takes_features
def test_memory_is_bounded_and_what_came_first_stays() -> None:
    model, encoder = frozen("qwen2_vl")
    groups = groups_of(encoder)[0]
    roomy = FeatureCache(model, encoder.family, limit=10**9)
    roomy.fill(packed_of(encoder, groups), CPU)
    tight = FeatureCache(model, encoder.family, limit=roomy.bytes // 2)
    wanted = branch_logps(model, packed_of(encoder, groups)).sums
    for _ in range(2):
        packed = packed_of(encoder, groups)
        tight.fill(packed, CPU)
        torch.testing.assert_close(branch_logps(model, packed).sums, wanted, rtol=1e-6, atol=0)
    assert 0 < tight.bytes <= tight.limit
    assert 0 < tight.hits < roomy.misses


def test_features_that_something_trains_are_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model, encoder = frozen("qwen2_vl")
    vision_tower(model).requires_grad_(True)
    assert not FeatureCache.serves(model, encoder.family)
    assert open_features(model, encoder.family, 10**9) is None
    model, encoder = frozen("llava_next")
    model.model.image_newline.requires_grad_(True)  # type: ignore[union-attr]
    assert not FeatureCache.serves(model, encoder.family)
    assert open_features(model, encoder.family, 10**9) is None
    model, encoder = frozen("mllama")
    assert not FeatureCache.serves(model, encoder.family)
    assert open_features(model, encoder.family, 10**9) is None
    assert not capsys.readouterr().out, "no library stands in the way here"
