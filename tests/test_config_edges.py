"""Configs at their edges: YAML that grows, odd arguments, keys of other programs, verbs of other programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from visrl.cli import ELSEWHERE, main
from visrl.config import ConfigError, read_config, read_yaml
from visrl.evolve.config import GenerateConfig
from visrl.models.tiny import CHECKPOINT
from visrl.serve.config import ServeConfig
from visrl.train.config import OTHER_STAGES, TrainConfig
from visrl.yaml_text import YamlError, parse_yaml

GIVEN = ["model_name_or_path=m", "output_dir=o"]
LAUGHS = "a: &a [" + ", ".join("x" * 9) + "]\n" + "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("5E6", 5e6), ("-1e+3", -1000.0), (".5", 0.5), ("1.", 1.0), ("1_000", 1000), ("010", 10),
        ("0x1f", 31), ("1:30", "1:30"), ("1e", "1e"), ("e4", "e4"), ("true", True), ("null", None), ("'1e-4'", "1e-4"),
        ("{min_lr: 1e-6}", {"min_lr": 1e-6}), ("2024-01-31", "2024-01-31"), ("2024-13-45", "2024-13-45"),
    ],
)  # fmt: skip
def test_numbers_are_those_that_people_write(text: str, value: object) -> None:
    read = parse_yaml(text)
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (LAUGHS, "aliases that stand for more than"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 500 + "]" * 500, "deep"),
        ("a: 1\na: 2", "stands there twice"),
        ("a: !!timestamp 2024-13-45", "cannot be read"),
        ("a: !!int x", "cannot be read"),
        ("a: " + "9" * 5000, "cannot be read"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: [", "line 1"),
    ],
    ids=range(9),
)
def test_yaml_that_is_none_or_grows_is_refused_in_a_line(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(YamlError, match=told) as refused:
        parse_yaml(text)
    assert len(str(refused.value)) < 300
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_yaml(tmp_path / "c.yaml")


def test_a_file_that_is_no_config_is_not_read_to_its_end(tmp_path: Path) -> None:
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(10**10)  # of holes
    with pytest.raises(ConfigError, match="more than 1,000,000 bytes"):
        read_yaml(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("=", "not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("a==b", "unknown key 'a'"),
        ("[", "no config at ["),
        ("x" * 400, "no config at x"),
        ("x" * 400 + "=1", "unknown key 'xxx"),
        ("é=1", "unknown key 'é'"),
        ("rounds=[", "the value is not YAML"),
        ("rounds=\udcff", "the value is not YAML"),
        ("rounds=" + "y" * 100_000, "rounds"),
    ],
    ids=range(10),
)
def test_odd_words_are_one_short_sentence(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["generate", word, "model_name_or_path=m", "dataset=d", "output_dir=o"])
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert told in said
    assert len(said) < 600
    assert said.count("\n") == 1


def test_a_value_in_an_error_is_short_and_keeps_secrets() -> None:
    with pytest.raises(ConfigError, match=r"port: .*\(got ") as refused:
        read_config(ServeConfig, None, ["model_name_or_path=m", "port=http://user:hunter2@host/" + "x" * 1000])
    assert "hunter2" not in str(refused.value)
    assert len(str(refused.value)) < 300
    with pytest.raises(ConfigError, match="api_key") as refused:
        read_config(ServeConfig, None, ["model_name_or_path=m", "api_key=[hunter2]"])
    assert "hunter2" not in str(refused.value)


def test_a_typo_is_refused_without_torch_and_with_one_key_only() -> None:
    program = (
        "import sys\nfrom visrl.cli import main\n"
        "try:\n    main(['train', 'model_name_or_path=m', 'output_dir=o', 'learning_rat=1'])\n"
        "except SystemExit:\n    print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n"
    assert done.stderr == "visrl: the command line: unknown key 'learning_rat'; did you mean 'learning_rate'?\n"


def test_vision_configs_of_llama_factory_are_read_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The keys of its examples for Qwen2.5-VL, with the values that they have there."""
    (tmp_path / "theirs.yaml").write_text(
        "model_name_or_path: m\nimage_max_pixels: 262144\nvideo_max_pixels: 16384\ntrust_remote_code: true\n"
        "stage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
        "dataset: mllm_demo\nmedia_dir: pictures\ntemplate: qwen2_vl\ncutoff_len: 2048\nmax_samples: 1000\n"
        "overwrite_cache: true\npreprocessing_num_workers: 16\ndataloader_num_workers: 4\n"
        "output_dir: saves/sft\nlogging_steps: 10\nsave_steps: 500\nplot_loss: true\noverwrite_output_dir: true\n"
        "save_only_model: false\nreport_to: none\nper_device_train_batch_size: 1\ngradient_accumulation_steps: 8\n"
        "learning_rate: 1.0e-4\nnum_train_epochs: 3.0\nlr_scheduler_type: cosine\nwarmup_ratio: 0.1\nbf16: true\n"
        "ddp_timeout: 180000000\nresume_from_checkpoint: null\nflash_attn: fa2\nenable_thinking: false\n"
    )
    config = read_config(TrainConfig, tmp_path / "theirs.yaml")
    assert (config.image_root, config.warmup_steps, config.ddp_timeout) == ("pictures", 0.1, 180_000_000)
    named = capsys.readouterr().out
    assert named.startswith("without a meaning here: enable_thinking (")
    for key in ("video_max_pixels", "template", "overwrite_cache", "preprocessing_num_workers", "flash_attn"):
        assert f"{key} (" in named


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("use_dora=true", "plain LoRA"),
        ("train_on_prompt=true", "only replies"),
        ("eval_dataset=other", "val_size"),
        ("add_tokens=a", "vocabulary"),
        ("use_galore=true", "optim"),
    ],
)
def test_a_key_of_another_program_that_would_change_something_is_refused(said: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_config(TrainConfig, None, [*GIVEN, said])
    read_config(TrainConfig, None, [*GIVEN, said.partition("=")[0] + "=false"])


@pytest.mark.parametrize("stage", OTHER_STAGES)
def test_other_stages_say_what_to_write(stage: str) -> None:
    with pytest.raises(ConfigError, match=rf"stage: .*stage: (dpo|sft|grpo).*\(got '{stage}'\)"):
        read_config(TrainConfig, None, [*GIVEN, f"stage={stage}"])


@pytest.mark.parametrize("whole", ["1", "1.0", "'2'", "100"])
def test_a_share_of_all_steps_is_not_taken_for_a_number_of_steps(whole: str) -> None:
    with pytest.raises(ConfigError, match="warmup_ratio is a share of all steps"):
        read_config(TrainConfig, None, [*GIVEN, f"warmup_ratio={whole}"])


def test_two_names_of_one_key_are_refused() -> None:
    with pytest.raises(ConfigError, match="warmup_ratio and warmup_steps are one key"):
        read_config(TrainConfig, None, [*GIVEN, "warmup_ratio=0.1", "warmup_steps=3"])


def test_keys_of_a_stage_go_over_the_files_and_under_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: m\nstage: dpo\nseed: 1\nstage2: {seed: 2, output_dir: two}\noutput_dir: one\n")
    assert [str(read_config(TrainConfig, path, [f"rl_stage={n}"]).output_dir) for n in (1, 2)] == ["one", "two"]
    assert read_config(TrainConfig, path, ["rl_stage=2", "seed=3"]).seed == 3
    path.write_text("stage2: 1\n")
    with pytest.raises(ConfigError, match="stage2: write the keys"):
        read_config(TrainConfig, path, ["stage=dpo", "rl_stage=2"])


@pytest.mark.parametrize("verb", ELSEWHERE)
def test_verbs_of_other_programs_say_where_that_is_done(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--some-option", "config.yaml"])
    assert end.value.code == 1
    assert f"`visrl {verb}` is no verb here: " in capsys.readouterr().err


@pytest.mark.parametrize("words", [["version"], ["--version"], ["env"], ["-h"], ["help"], ["train", "-h"]])
def test_what_everybody_types_first_is_understood(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2")
    with pytest.raises(SystemExit) as end:
        main(words)
    said = capsys.readouterr()
    assert end.value.code == 0
    assert "visrl" in said.out or "rl_stage" in said.out or "stage: sft" in said.out
    assert "hunter2" not in said.out + said.err
    if words == ["env"]:
        assert "transformers 5." in said.out


def test_truth_values_are_no_numbers() -> None:
    with pytest.raises(ConfigError, match="rounds: a number is wanted here"):
        read_config(GenerateConfig, None, ["model_name_or_path=m", "dataset=d", "output_dir=o", "rounds=true"])


def test_a_judge_that_is_not_there_is_named_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"model_name_or_path={CHECKPOINT}", "benchmark=samples", "dataset=scenes:test/0+2"]
    with pytest.raises(SystemExit) as end:
        main(["eval", *given, "judge_model_name_or_path=no/such/judge", f"output_dir={tmp_path / 'out'}"])
    assert end.value.code == 1
    assert "no model at no/such/judge" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_list_of_names_is_their_text_with_commas() -> None:
    config = read_config(TrainConfig, None, [*GIVEN, "dataset=[a, b.jsonl]", "lora_target=[q_proj, v_proj]"])
    assert (config.dataset, config.lora_target) == ("a,b.jsonl", "q_proj,v_proj")
    for given in ("dataset=[]", "dataset=[a, 1]", "lora_target={a: b}"):
        with pytest.raises(ConfigError, match=given.partition("=")[0]):
            read_config(TrainConfig, None, [*GIVEN, given])


def test_a_path_from_the_home_folder_is_found_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config(TrainConfig, None, ["model_name_or_path=~/m", "output_dir=~/runs/a", "dataset=a~/b"])
    found = (config.model_name_or_path, config.output_dir, config.dataset)
    assert found == (f"{tmp_path}/m", tmp_path / "runs" / "a", "a~/b")


@pytest.mark.parametrize("given", ["run_name=1.0", "dataset=123", "dataset=no", "output_dir=2024"])
def test_a_text_that_yaml_takes_for_something_else_is_to_be_quoted(given: str) -> None:
    key, _, text = given.partition("=")
    with pytest.raises(ConfigError, match=f"{key}: .*write it in quotes"):
        read_config(TrainConfig, None, [*GIVEN, given])
    assert str(getattr(read_config(TrainConfig, None, [*GIVEN, f'{key}="{text}"']), key)) == text
