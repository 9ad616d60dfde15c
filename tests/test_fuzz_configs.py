"""Configs of every key with values of wrong type, range and combination: a verb runs, or says one sentence.

All are read; of those that can be read a part is run, for what passes the reading may still not start.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest

from visrl.cli import main
from visrl.config import Config, ConfigError, read_config
from visrl.evaluate.config import EvalConfig
from visrl.evolve.config import GenerateConfig
from visrl.models.tiny import CHECKPOINT
from visrl.serve.config import ServeConfig
from visrl.train.config import TrainConfig
from visrl.train.export import ExportConfig

VALUES = [
    "", "null", "true", "no", "-1", "0", "1", "2", "3.7", "1e-4", "'5e-6'", "1e400", ".nan", "-.inf", "-0.0",
    "999999999999999999999999", "0x10", "010", "1_000", "[]", "[1, x]", "['', null]", "{}", "{a: {b: [c]}}", "{1: 2}",
    "some text", "''", "none", "auto", "no/such/place", "x" * 5000, "é\u202e", '"a\\0b"', '"\\ud800"', "!!binary aGk=",
    "!!python/name:os.system", "2024-13-45", "2024-01-02", "&a [*a]", "[" * 60 + "]" * 60, "{{x}}", "a: b: c", "- x",
    "http://127.0.0.1:9/v1", "http://[::1", "ftp://x", "user:pass@host", "%s%n", "*", "'no'", "@", "`", "{", "sigmoid",
    "cosine", "steps", "epoch", "best", "float16", "cuda", "cpu", "dpo", "kto", "lora", "full", "q_proj,v_proj", "4",
]  # fmt: skip
# What would be slow or many, whatever else a config says.
FEW = {
    "train": [
        "processes=1", "max_steps=1", "dataloader_num_workers=0", "disable_tqdm=true", "gradient_accumulation_steps=1",
    ],
    "generate": ["rounds=1", "request_attempts=1", "shard=1/1"],
    "eval": ["request_attempts=1", "max_samples=2"],
    "export": [],
    "api": ["port=0"],
}  # fmt: skip
KINDS: dict[str, type[Config]] = {
    "train": TrainConfig, "generate": GenerateConfig, "eval": EvalConfig, "export": ExportConfig, "api": ServeConfig,
}  # fmt: skip


@dataclass
class Case:
    verb: str
    words: list[str]


def cases(count: int, base: dict[str, list[str]], seed: int = 0) -> Iterator[Case]:
    """Configs that say each key of each verb in turn, with up to two others beside it."""
    draw = random.Random(seed)
    keys = [(verb, key) for verb, kind in KINDS.items() for key in sorted(kind.model_fields)]
    draw.shuffle(keys)
    for number in range(count):
        verb, key = keys[number % len(keys)]
        others = draw.sample(sorted(KINDS[verb].model_fields), draw.choice([0, 0, 1, 2]))
        said = [f"{name}={draw.choice(values_of(KINDS[verb], name))}" for name in (key, *others)]
        yield Case(verb, [*base[verb], *said])


def values_of(kind: type[Config], key: str) -> list[str]:
    """The values to draw from: any, and those that its type names twice as likely as by chance."""
    named = [str(one) for one in _literals(kind.model_fields[key].annotation)]
    return VALUES + named * 4


def _literals(annotation: Any) -> list[Any]:
    inner = get_args(annotation)
    return [one for part in inner for one in (_literals(part) or ([part] if isinstance(part, str) else []))]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """For each verb the words of a command that runs, in a folder of its own."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    row = (
        '{{"id": "{0}", "image": "scene:preference/{0}", "question": "Which?", "answer": "1", "box": [0, 0, 0.5, 0.5]}}'
    )
    Path("rows.jsonl").write_text("\n".join(row.format(number) for number in range(2)))
    model = f"model_name_or_path={CHECKPOINT}"
    return {
        "train": [model, "dataset=rows.jsonl", "output_dir=out", "val_size=0"],
        "generate": [model, "dataset=rows.jsonl", "critic=oracle", "output_dir=out"],
        "eval": [model, "benchmark=samples", "dataset=rows.jsonl", "output_dir=out"],
        "export": [model, "adapter_name_or_path=adapter", "export_dir=out"],
        "api": [model],
    }


def readable(case: Case) -> bool:
    """Whether a config can be read; if not, one short sentence says why."""
    try:
        read_config(KINDS[case.verb], None, case.words)
    except ConfigError as error:
        said = str(error)
        assert said.count("\n") == 0, said
        assert len(said) < 1000, said
        assert "\0" not in said
        return False
    return True


def run(case: Case, capsys: pytest.CaptureFixture[str]) -> int:
    """The status of a verb, which says one sentence where it is not 0 and then leaves nothing claimed."""
    with pytest.raises(SystemExit) as end:
        main([case.verb, *case.words, *FEW[case.verb]])
    said = capsys.readouterr().err
    if end.value.code:
        assert "Traceback" not in said, (case, said)
        assert any(line.startswith("visrl: ") for line in said.splitlines()), (case, said)
        claimed = [str(path) for path in Path().rglob("started.json")]
        assert not claimed, (case, said)
    return int(end.value.code or 0)


def fuzz(
    count: int, starts: int, base: dict[str, list[str]], capsys: pytest.CaptureFixture[str], seed: int = 0
) -> Counter[str]:
    import shutil

    counts: Counter[str] = Counter()
    for case in cases(count, base, seed):
        if not readable(case):
            counts[f"{case.verb}: refused when read"] += 1
            continue
        counts[f"{case.verb}: read"] += 1
        if starts > 0 and case.verb != "api":
            starts -= 1
            status = run(case, capsys)
            counts[f"{case.verb}: ended with {status}"] += 1
            for folder in (path for path in Path().iterdir() if path.is_dir()):  # some cases name another than `out`
                shutil.rmtree(folder)
    return counts


def test_two_hundred_configs_are_read_or_refused_in_a_sentence(
    base: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = fuzz(200, 0, base, capsys)
    assert sum(counts.values()) == 200
    assert sum(count for said, count in counts.items() if "refused" in said) > 100


@pytest.mark.slow
def test_five_thousand_configs_are_read_or_refused_and_those_read_run_or_say_why(
    base: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = fuzz(5000, 400, base, capsys, seed=1)
    with capsys.disabled():
        print("\n".join(f"{count:5} {said}" for said, count in sorted(counts.items())))
    assert sum(count for said, count in counts.items() if "ended" not in said) == 5000
