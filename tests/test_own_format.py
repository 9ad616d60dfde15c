"""A format from outside the package, named as module:NAME: the one that docs/DATA.md shows."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from data_rows import write_lines
from typer.testing import CliRunner

from visrl.box import Box
from visrl.cli import app
from visrl.data.formats import FORMATS
from visrl.data.rows import json_items
from visrl.data.sources import hash_source, read_preferences, read_samples
from visrl.records import RecordError, VisrlWarning

DOCS = (Path(__file__).parents[1] / "docs" / "DATA.md").read_text(encoding="utf-8")
ROWS = [
    {"file": "a.jpg", "ask": "What?", "say": "that", "xywh": [64, 48, 128, 96], "width": 640, "height": 480},
    {"file": "b.jpg", "ask": "Who?", "say": "Ada", "xywh": [0, 0, 10, 20], "width": 100, "height": 50},
]
OUTSIDE = ROWS[1] | {"xywh": [95, 0, 10, 20]}


def run(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == code, done.output
    return done.stderr if code else done.stdout


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the module of the documentation on Python's path, and rows in its format."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "xywh", raising=False)  # of another test's folder
    (module,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.S)
    (tmp_path / "xywh.py").write_text(module, encoding="utf-8")
    write_lines(tmp_path / "shop.jsonl", ROWS)
    return tmp_path


def test_what_the_documentation_shows_reads_and_writes(shop):
    (block,) = re.findall(r"```bash\n(.*?)```", DOCS, flags=re.S)
    for command in block.splitlines():
        run(*shlex.split(command)[1:])
    first, second = json_items(shop / "ours.jsonl")
    assert first["box"] == pytest.approx([0.1, 0.1, 0.3, 0.3])
    assert (second["image"], second["answer"], second["size"]) == ("b.jpg", "Ada", [100, 50])
    assert list(json_items(shop / "back.jsonl")) == ROWS


def test_a_bad_row_of_it_is_listed_like_any_other(shop):
    write_lines(shop / "shop.jsonl", [*ROWS, OUTSIDE, 5])
    report = json.loads(run("data", "check", "--from", "xywh:XYWH", "--json", "shop.jsonl"))
    assert (report["good"], report["bad"]["outside"], report["bad"]["unparseable"]) == (2, 1, 1)
    run("data", "convert", "--from", "xywh:XYWH", "--to", "visrl", "shop.jsonl", "ours.jsonl")
    assert [row["raw"] for row in json_items("ours.jsonl.bad.jsonl")] == [OUTSIDE, 5]
    write_lines(shop / "pool.jsonl", [{"image": "a.jpg", "question": "?", "answer": "!"}])
    run("data", "convert", "--from", "visrl", "--to", "xywh:XYWH", "pool.jsonl", "none.jsonl", code=1)
    assert [row["fault"] for row in json_items("none.jsonl.bad.jsonl")] == ["no_box"]


def test_what_trains_and_generates_reads_it_by_the_name_of_a_data_set(shop):
    info = {"shop": {"file_name": "shop.jsonl", "formatting": "xywh:XYWH"}}
    (shop / "dataset_info.json").write_text(json.dumps(info))
    first, second = read_samples("shop", dataset_dir=str(shop))
    assert (first.question, first.answer, first.size) == ("What?", "that", (640, 480))
    assert second.box == Box(0, 0, 0.1, 0.4)
    before = hash_source("shop", str(shop))
    assert before == hash_source("shop", str(shop)) != "shop"
    with open(shop / "xywh.py", "a") as module:  # read by another module it is other data
        module.write("\n# changed\n")
    assert hash_source("shop", str(shop)) != before
    with pytest.raises(RecordError, match="shop holds no preferences"):
        read_preferences("shop", dataset_dir=str(shop))
    info["shop"]["columns"] = {"images": "file"}
    (shop / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(RecordError, match="'columns' says nothing to xywh:XYWH"):
        read_samples("shop", dataset_dir=str(shop))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all:XYWH", "there is no module 'nowhere_at_all'"),
        ("xywh:ABCD", "xywh has no 'ABCD'"),
        ("xywh:parse", "xywh:parse is no data format: it must be a DataFormat"),
    ],
)
def test_what_is_no_format_is_one_sentence(shop, name, said):
    message = run("data", "convert", "--from", name, "--to", "visrl", "shop.jsonl", "ours.jsonl", code=1)
    assert said in message
    assert message.count("\n") == 1
    assert not (shop / "ours.jsonl").exists()
    message = run("data", "check", "--from", "xywh:XYWH", "--columns", "a=b", "shop.jsonl", code=1)
    assert "--columns is for --from hf; it says nothing of xywh:XYWH" in message


def test_the_documentation_and_the_help_name_every_format_of_the_table():
    shown = run("data", "convert", "--help")
    for name, each in FORMATS.items():
        assert f"| `{name}` | {each.about} |" in DOCS
        assert name in shown


TABLE = """
import csv
from visrl.data.formats import DataFormat
from visrl.data.rows import RowFault, parsed_row
from visrl.records import Picture, Preference

def parse(raw, number):
    if not raw["worse"]:
        raise RowFault("no_reply", "'worse' is empty")
    prompt = "<image>\\n" + raw["ask"]
    return (Preference(f"{number}", "answer", prompt, (Picture(raw["file"]),), raw["better"], raw["worse"]),)

def read(path, reading):
    with open(path, newline="", encoding="utf-8") as file:
        for number, raw in enumerate(csv.DictReader(file), start=1):
            yield parsed_row(raw, number, parse)

CSV = DataFormat(name="csv", about="two replies to a question", read=read, called=("spreadsheet",))
"""


def test_a_format_may_read_files_of_any_kind_and_give_preferences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "two_replies.py").write_text(TABLE)
    (tmp_path / "a.csv").write_text("file,ask,better,worse\na.jpg,What?,that,this\nb.jpg,Who?,Ada,\n")
    text = run("data", "convert", "--from", "two_replies:CSV", "--to", "visrl", "a.csv", "pairs.jsonl")
    assert "listed 1 bad rows in pairs.jsonl.bad.jsonl: 1 no_reply" in text
    (pair,) = read_preferences("pairs.jsonl")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("<image>\nWhat?", "that", "this")
    info = {"pairs": {"file_name": "a.csv", "formatting": "two_replies:CSV"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.warns(VisrlWarning, match="1 of 2 rows cannot be read; row 2: 'worse' is empty"):
        assert read_preferences("pairs", dataset_dir=".") == [pair]
    message = run("data", "convert", "--from", "visrl", "--to", "two_replies:CSV", "pairs.jsonl", "b.csv", code=1)
    assert "no format 'two_replies:CSV' to write" in message
