"""Whole updates and advantages against TRL's own GRPOTrainer on the same rollouts, pictures included."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from visrl.models.load import load_encoder
from visrl.rewards.advantages import Reward, grpo

BOXES, ANSWERS = 4, 2


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module of the benchmark that runs both trainers, a model's folder, and rollouts of one question."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")  # of `rollout_func`
        patch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
        import layouts
        import online_layouts

        shape, folder = layouts.Shape("tiny", 16, 4, 640, pictures=1), tmp_path_factory.mktemp("model")
        layouts.make_model(folder, shape)
        yield online_layouts, folder, online_layouts.Rollouts(load_encoder(folder), shape, BOXES, ANSWERS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's, of transformers
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(("name", "theirs"), [
    ("grpo", {}), ("bnpo", {}), ("dr_grpo", {}), ("dapo", {}), ("cispo", {}),
    ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
])  # fmt: skip
def test_two_updates_equal_those_of_trls_trainer(
    layouts: tuple[ModuleType, Path, Any], tmp_path: Path, name: str, theirs: dict[str, Any], beta: float
) -> None:
    """The second learns from the rollouts of the first, so that ratios have left 1 and some are clipped. SGD, for a
    rounding error stays one."""
    module, folder, rollouts = layouts
    clip = {} if name == "cispo" else {"epsilon": 0.02 if name != "gspo" else 0.005}
    same = {"num_iterations": 2, "max_steps": 2, "beta": beta, "optim": "sgd", "learning_rate": 0.02, **clip,
            "logging_strategy": "steps", "logging_steps": 1}  # fmt: skip
    ours = module.Ours(folder, tmp_path, rollouts, loss_type=name, **same)
    trl = module.Trl(
        folder, tmp_path, rollouts, size=len(rollouts.flat), use_bias_correction_kl=True,
        **{"loss_type": name, **theirs}, **same,
    )  # fmt: skip
    for layout in (ours, trl):
        layout.trainer.train()
    assert ours.watch.losses == pytest.approx(trl.watch.losses, rel=1e-5)
    assert abs(ours.watch.losses[1] - ours.watch.losses[0]) > 1e-3 * abs(ours.watch.losses[0])
    assert (ours.watch.gradient - trl.watch.gradient).norm() < 1e-4 * trl.watch.gradient.norm()
    if clip:
        own, other = ([row["clip_ratio/region_mean"] for row in layout.trainer.state.log_history[:2]]
                      for layout in (ours, trl))  # fmt: skip
        assert own[0] == other[0] == 0
        assert 0 < own[1] < 1
        assert 0 < other[1] < 1
    if beta:
        assert ours.trainer.state.log_history[1]["kl"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_those_of_trls_trainer(
    layouts: tuple[ModuleType, Path, Any], tmp_path: Path, scale: Any
) -> None:
    """Of six groups of two, one all equal and one with a reward that could not be told."""
    from trl import GRPOTrainer

    module, folder, rollouts = layouts
    groups: list[list[Reward]] = [[1.0, 0.0], [0.5, 0.25], [1.0, 1.0], [None, 0.7], [0.1, 0.9], [0.0, 0.3]]
    flat = [reward for group in groups for reward in group]
    trainer = module.Trl(folder, tmp_path, rollouts, size=len(flat), scale_rewards=scale, max_steps=1).trainer
    trainer.reward_funcs = [lambda completions, **columns: flat]
    rows = [trainer.train_dataset[n // ANSWERS] for n in range(len(flat))]
    theirs = GRPOTrainer._generate_and_score_completions(trainer, rows)["advantages"]
    ours = torch.tensor([value or 0.0 for group in grpo(groups, scale=scale) for value in group.values])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
