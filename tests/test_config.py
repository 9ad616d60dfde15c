from pathlib import Path

import pytest
import yaml

from visrl.config import ConfigError, read_config
from visrl.evolve.config import DemoConfig, FilterConfig, GenerateConfig
from visrl.train.config import TrainConfig
from visrl.train.export import ExportConfig

ROOT = Path(__file__).parent.parent


def test_an_unknown_key_names_the_near_one(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("model_name_or_path: m\noutput_dir: o\npref_beat: 0.1\n")
    with pytest.raises(ConfigError, match=r"train\.yaml: unknown key 'pref_beat'; did you mean 'pref_beta'\?"):
        read_config(TrainConfig, path)


def test_a_training_argument_is_known_and_its_typo_is_not(tmp_path):
    given = ["model_name_or_path=m", "output_dir=o"]
    config = read_config(TrainConfig, None, [*given, "gradient_accumulation_steps=4"])
    assert config.training_arguments() == {"gradient_accumulation_steps": 4}
    with pytest.raises(ConfigError, match="did you mean 'gradient_accumulation_steps'"):
        read_config(TrainConfig, None, [*given, "gradient_acumulation_steps=4"])


def test_names_of_older_releases_are_translated():
    given = ["model_name_or_path=m", "output_dir=o", "warmup_ratio=0.1", "overwrite_output_dir=true"]
    assert read_config(TrainConfig, None, given).training_arguments() == {"warmup_steps": 0.1}


def test_what_is_no_yaml_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match=r"'dataset=\[a': the value is not YAML"):
        read_config(TrainConfig, None, ["model_name_or_path=m", "output_dir=o", "dataset=[a"])
    (tmp_path / "weights.safetensors").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_config(TrainConfig, tmp_path / "weights.safetensors")


def test_a_value_of_the_wrong_type_names_its_key():
    with pytest.raises(ConfigError, match="pref_beta"):
        read_config(TrainConfig, None, ["model_name_or_path=m", "output_dir=o", "pref_beta=much"])
    with pytest.raises(ConfigError, match="key=value"):
        read_config(GenerateConfig, None, ["rounds"])
    with pytest.raises(ConfigError, match="model_name_or_path must be given"):
        read_config(GenerateConfig, None, ["rounds=2"])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (TrainConfig, "tiny/train_sft.yaml"),
        (TrainConfig, "tiny/train_rl.yaml"),
        (TrainConfig, "tiny/train_reward_model.yaml"),
        (ExportConfig, "tiny/merge_lora.yaml"),
        (TrainConfig, "qwen2_5_vl_3b_sft.yaml"),
        (TrainConfig, "qwen2_5_vl_3b_rl.yaml"),
        (ExportConfig, "qwen2_5_vl_3b_merge.yaml"),
        (TrainConfig, "qwen2_5_vl_7b_sft.yaml"),
        (TrainConfig, "qwen2_5_vl_7b_rl.yaml"),
        (ExportConfig, "qwen2_5_vl_7b_merge.yaml"),
    ],
)
def test_shipped_configs_are_read(kind, name):
    assert read_config(kind, ROOT / "configs" / name)


def test_defaults_of_generation_are_the_papers():
    config = read_config(GenerateConfig, None, ["model_name_or_path=m", "dataset=d", "output_dir=o"])
    assert (config.rounds, config.trigger) == (5, 0.2)
    config = read_config(FilterConfig, None, ["input_dir=i", "dataset=d", "output_dir=o"])
    assert (config.t_max, config.t_min, config.rule) == (0.8, 0.2, "paper")


def test_every_config_file_is_yaml_with_flat_keys():
    files = sorted((ROOT / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file


def test_demo_config_is_closed():
    with pytest.raises(ConfigError, match="did you mean 'iterations'"):
        read_config(DemoConfig, None, ["iteration=2"])


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_distributed_configs_are_accelerates(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "configs" / "distributed" / f"{name}.yaml"))
    assert config.num_processes == 8
    assert config.distributed_type.name in ("MULTI_GPU", "FSDP", "DEEPSPEED")
