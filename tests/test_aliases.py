"""One key has one name: an older one, or another program's, is translated, and one of ours says so in a line."""

import json
from pathlib import Path

import pytest
import yaml

from visrl.config import Config, ConfigError, as_config, read_config
from visrl.evaluate.config import EvalConfig
from visrl.evolve.config import EvolveConfig, FilterConfig, GenerateConfig
from visrl.foreign import ALIASES, RENAMED
from visrl.train.config import TrainConfig
from visrl.train.export import ExportConfig

KINDS = (TrainConfig, ExportConfig, GenerateConfig, FilterConfig, EvolveConfig, EvalConfig)
NEEDED = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
# A value of each key, and another one.
VALUES = {
    "critic.box": (False, True),
    "codec": ("visrl", "viscot"),
    "questions": (3, 4),
    "limit": (3, 4),
    "warmup_ratio": (0.1, 0.2),
    "evaluation_strategy": ("steps", "no"),
    "media_dir": ("a", "b"),
    "enable_liger_kernel": (False, None),
    "no_cuda": (True, False),
    "num_ppo_epochs": (1, 2),
    "ppo_epochs": (1, 2),
    "cliprange": (0.2, 0.1),
    "response_length": (64, 65),
    "ppo_whiten_rewards": (False, True),
    "moe_aux_loss_coef": (0.01, 0.0),
}
CASES = [
    (old, next(kind for kind in (EvolveConfig, EvalConfig, *KINDS) if new in kind.model_fields))
    for old, new in ALIASES.items()
]


def test_every_alias_is_of_a_key_and_tried_here():
    keys = set().union(*(kind.model_fields for kind in KINDS))
    assert set(ALIASES.values()) <= keys
    assert not ALIASES.keys() & keys
    assert ALIASES.keys() == VALUES.keys()


@pytest.mark.parametrize(("old", "kind"), CASES, ids=[old for old, _ in CASES])
def test_an_alias_means_its_key_in_a_file_and_after_it_and_one_of_ours_says_so(
    old: str, kind: type[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, (value, other) = ALIASES[old], VALUES[old]
    needed = {key: text for key, text in NEEDED.items() if key in kind.model_fields}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**needed, old: value}))
    assert getattr(read_config(kind, path), new) == value
    assert capsys.readouterr().out == (f"{path}: {old} is called {new} now\n" if old in RENAMED else "")
    given = [f"{key}={json.dumps(text)}" for key, text in {**needed, old: value}.items()]
    assert getattr(read_config(kind, None, given), new) == value
    assert (f"{old} is called {new} now\n" in capsys.readouterr().out) == (old in RENAMED)
    assert getattr(as_config(kind, None, {**needed, old: value}), new) == value

    # What is given goes over the file, whichever name either uses.
    path.write_text(yaml.safe_dump({**needed, old: other}))
    assert getattr(read_config(kind, path, [f"{new}={json.dumps(value)}"]), new) == value
    path.write_text(yaml.safe_dump({**needed, new: other}))
    assert getattr(read_config(kind, path, [f"{old}={json.dumps(value)}"]), new) == value
    # Both names in one place are refused.
    path.write_text(yaml.safe_dump({**needed, old: value, new: other}))
    with pytest.raises(ConfigError, match=f"{old} and {new} are one key; give one of them"):
        read_config(kind, path)
    with pytest.raises(ConfigError, match=f"{old} and {new} are one key"):
        read_config(kind, None, [*given, f"{new}={json.dumps(other)}"])


def test_a_stages_own_keys_are_translated_too(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({**NEEDED, "stage": "dpo", "codec": "visrl", "stage1": {"box_codec": "viscot"}}))
    assert read_config(TrainConfig, path).box_codec == "viscot"


def test_manifests_keep_the_names_that_runs_were_begun_under() -> None:
    """What a renamed key would change in an identity: a run of an earlier release would be refused, not resumed."""
    evolve = EvolveConfig(**NEEDED, max_samples=4, box_codec="visrl").recorded()
    assert (evolve["questions"], evolve["codec"]) == (4, "visrl")
    assert not {"max_samples", "box_codec"} & evolve.keys()
    evaluation = EvalConfig(**NEEDED, max_samples=4).recorded()
    assert evaluation["limit"] == 4
    assert "max_samples" not in evaluation
    generation = GenerateConfig(**NEEDED, max_samples=4, box_codec="visrl").recorded(exclude={"seed"})
    assert (generation["max_samples"], generation["codec"]) == (4, "visrl")
    assert "seed" not in generation
