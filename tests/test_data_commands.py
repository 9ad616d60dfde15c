"""`visrl data` as users type it, the demo data, and every command of docs/DATA.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_rows import BAD, benchmark, good_boxes, meta, write_lines
from PIL import Image
from typer.testing import CliRunner

from visrl.cli.data import app
from visrl.conversation import crop_view, open_view
from visrl.data.info import is_named
from visrl.data.rows import json_items
from visrl.data.sources import hash_source, named_preferences, named_samples
from visrl.records import Picture, RecordError, VisrlWarning
from visrl.scenes import scene_samples

ROOT = Path(__file__).parent.parent
COUNTS = {"inverted": 2, "outside": 3, "empty": 1, "unparseable": 0}


def run(*arguments: str, ok: bool = True):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert (result.exit_code == 0) is ok, result.output
    return result


def test_check_prints_one_json_object_and_nothing_else(tmp_path):
    path, sizes, _ = benchmark(tmp_path)
    result = run("check", "--from", "viscot", "--sizes", sizes, "--json", path)
    report = json.loads(result.stdout)
    assert report == {"rows": 26, "good": 20, "bad": COUNTS, "missing_images": None}
    report = json.loads(run("check", "--from", "viscot-detection", "--json", sizes).stdout)
    assert report == {"rows": 26, "good": 20, "bad": COUNTS, "missing_images": None}


def test_check_finds_pictures_that_are_missing_broken_or_absurd(tmp_path):
    rows = [meta(i, [[1, 1, 30, 30]], (64, 48), "sroie") for i in range(5)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    folder = tmp_path / "pictures" / "cot" / "sroie"
    folder.mkdir(parents=True)
    for i in (0, 1):
        Image.new("RGB", (64, 48)).save(folder / f"{i}.jpg")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:300])
    Image.new("RGB", (8, 6)).save(folder / "2.jpg")
    Image.new("RGB", (48, 64)).save(folder / "3.jpg")  # another picture: the annotation says 64 × 48
    text = run("check", "--from", "viscot-meta", "--images", str(tmp_path / "pictures"), path).stdout
    assert "5 rows: 5 good, 0 bad" in text
    assert "5 pictures, 1 missing" in text
    assert "sroie: 1 missing; they belong in" in text
    assert "pictures/cot/sroie/" in text
    assert "unreadable: 2" in text
    assert "annotated as 64 × 48" in text
    assert "absurd: 1" in text
    report = json.loads(
        run("check", "--from", "viscot-meta", "--images", str(tmp_path / "pictures"), "--json", path).stdout
    )
    assert report["missing_images"] == 1


def test_check_finds_duplicates_and_pictures_in_two_splits(tmp_path):
    train = [meta(i, [[1, 1, 30, 30]], (64, 48)) for i in (0, 1, 1)]
    test = [meta(i, [[2, 2, 30, 30]], (64, 48)) | {"split": "test"} for i in (1, 2)]
    paths = [write_lines(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))]
    text = run("check", "--from", "viscot-meta", *paths).stdout
    assert "duplicates: 1" in text
    assert "leaks: 1" in text
    assert "cot/gqa/1.jpg is in 'train' and in 'test'" in text


def test_convert_lists_what_it_dropped(tmp_path):
    path, sizes, _ = benchmark(tmp_path)
    out = str(tmp_path / "out.jsonl")
    text = run("convert", "--from", "viscot", "--to", "viscot-detection", "--sizes", sizes, path, out).stdout
    assert "read 26 rows" in text
    assert f"wrote 20 rows to {out}" in text
    assert f"listed 6 bad rows in {out}.bad.jsonl: 3 outside, 2 inverted, 1 empty" in text


def test_a_conversion_of_bad_rows_alone_fails(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [meta(0, [[30, 1, 1, 30]], (64, 48))])
    result = run("convert", "--from", "viscot-meta", "--to", "visrl", path, tmp_path / "b.jsonl", ok=False)
    assert "listed 1 bad rows" in result.stdout
    assert "none of the rows can be written" in result.stderr


def test_check_says_which_format_the_rows_have_and_how_many_it_does_not_show(tmp_path):
    path, _, _ = benchmark(tmp_path)
    text = run("check", "--from", "visrl", path).stdout
    assert "unparseable: 26" in text
    assert "and 23 more" in text
    assert "26 of them have the keys of viscot: read them with --from viscot" in text
    assert "have the keys" not in run("check", "--from", "viscot", path).stdout


def test_an_input_is_not_written_over(tmp_path):
    path, _, rows = benchmark(tmp_path)
    (tmp_path / "again").symlink_to(path)
    for out in (path, tmp_path / "again"):
        assert "is an input" in run("convert", "--from", "viscot", "--to", "rl-pool", path, out, ok=False).stderr
    assert json.loads(Path(path).read_text()) == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("convert", "--from", "viscott", "--to", "visrl", "a.json", "b.jsonl"), "no format 'viscott'"),
        (("convert", "--from", "viscot", "--to", "coco", "a.json", "b.jsonl"), "no format 'coco'"),
        (("convert", "--from", "viscot", "a.json", "b.jsonl"), "say the format with --to"),
        (("convert", "--from", "viscot", "--to", "visrl", "nowhere.json", "b.jsonl"), "no data at nowhere.json"),
        (("convert", "--from", "viscot", "--to", "visrl", "--take", "x", "a", "b"), "'x' must be a number of rows"),
        (("convert", "--from", "viscot", "--to", "visrl", "--validation", "1.5", "a", "b"), "less than 1"),
        (("check", "--from", "viscot", "--sizes", "nowhere.jsonl", "a.json"), "no data at nowhere.jsonl"),
        (("check", "--from", "visrl", "--box-space", "pixels", "a.json"), "box_space must be one of image"),
    ],
)
def test_bad_input_is_one_clear_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, ok=False)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_subset_the_reference_took(tmp_path):
    rows = [meta(i, [[1, 1, 9, 9]], (10, 10), dataset) for i in range(4) for dataset in ("gqa", "docvqa")]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = ROOT / "configs" / "data_reference_pool.yaml"
    text = run("convert", "--config", config, "--from", "viscot-meta", "--skip", "1", path, tmp_path / "b.jsonl").stdout
    assert "wrote 3 rows" in text
    assert {row["source"] for row in json_items(tmp_path / "b.jsonl")} == {"gqa"}


def test_commands_start_without_torch():
    code = (
        "import sys; from visrl.cli import data; from visrl.data import check, convert; "
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --- The demo data --------------------------------------------------------------------------------------------------


def test_the_demo_files_are_what_their_script_makes(tmp_path):
    copy = tmp_path / "make_demo.py"
    copy.write_text((ROOT / "data" / "make_demo.py").read_text())
    subprocess.run([sys.executable, str(copy)], check=True, cwd=ROOT)
    for name in ("demo_sft_data.json", "demo_rl_data.json", "dataset_info.json"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes(), f"run data/make_demo.py ({name})"


def test_the_demo_names_give_samples_and_preferences():
    samples = named_samples("demo_sft_data", ROOT / "data")
    true = scene_samples("train", 0, 12, per_scene=2, with_box=True)
    assert [(s.image, s.question, s.answer) for s in samples] == [(s.image, s.question, s.answer) for s in true]
    assert all(s.box == t.box for s, t in zip(samples, true, strict=True))
    stage1 = named_preferences("demo_rl_data_stage1", ROOT / "data")
    stage2 = named_preferences("demo_rl_data_stage2", ROOT / "data")
    assert [p.step for p in stage1] == ["box"] * 24
    assert [p.step for p in stage2] == ["box", "answer"] * 24
    assert stage2[::2] == stage1
    part = stage2[1].images[1]
    assert min(crop_view(open_view(part), part).size) >= 28
    with pytest.raises(RecordError, match="holds preferences"):
        named_samples("demo_rl_data_stage1", ROOT / "data")
    assert is_named("demo_sft_data", ROOT / "data")
    assert not is_named("demo_sft_data,other", ROOT / "data")


def test_a_data_set_is_known_by_what_is_in_its_files(tmp_path):
    shutil.copytree(ROOT / "data", tmp_path, dirs_exist_ok=True)
    before = hash_source("demo_sft_data,demo_rl_data_stage1", str(tmp_path))
    assert hash_source("demo_sft_data, demo_rl_data_stage1", str(ROOT / "data")) == before
    file = tmp_path / "demo_sft_data.json"
    file.write_text(file.read_text().replace("red", "blue"))
    assert hash_source("demo_sft_data,demo_rl_data_stage1", str(tmp_path)) != before
    assert hash_source(str(file)) == hash_source("demo_sft_data", str(tmp_path))
    assert hash_source("scenes:test/0+5") == "scenes:test/0+5"


def test_a_named_set_with_bad_rows_warns_with_the_first_reason(tmp_path):
    rows = [{"images": ["a.jpg"], "conversations": []}, {"images": ["a.jpg"], "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "this"}]}]  # fmt: skip
    write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"file_name": "a.jsonl", "formatting": "sharegpt"}}))
    with pytest.warns(VisrlWarning, match="1 of 2 rows cannot be read; row 1: 'conversations' must be a list"):
        assert [sample.answer for sample in named_samples("a", tmp_path)] == ["this"]


def test_crops_of_samples_are_made_when_they_are_opened(tmp_path):
    Image.new("RGB", (200, 100), (9, 200, 9)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "question": "What?", "answer": "green", "box": [0.25, 0.0, 0.75, 0.5]}]
    path = write_lines(tmp_path / "own.jsonl", rows)
    run("convert", "--from", "visrl", "--to", "viscot-sft2", path, tmp_path / "sft2.jsonl")
    (sample,) = named_samples("sft2", tmp_path)
    part = Picture(sample.image, sample.box, sample.size)
    assert crop_view(open_view(part, tmp_path), part).size == (100, 50)
    assert sorted(each.name for each in tmp_path.glob("*.png")) == ["a.png"]


# --- The documentation ----------------------------------------------------------------------------------------------


def documented_commands() -> list[str]:
    text = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_every_command_of_the_documentation_runs(tmp_path, monkeypatch):
    """In a folder with the files that docs/DATA.md speaks of, made here."""
    commands = documented_commands()
    assert len(commands) >= 8
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data").mkdir()
    for path in (ROOT / "data").glob("*.json"):
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    own = [{"image": f"{i}.png", "question": "What?", "answer": "this"} for i in range(3)]
    write_lines(tmp_path / "mine.jsonl", own)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 48)).save(tmp_path / "pictures" / f"{i}.png")
    path, sizes, _ = benchmark(tmp_path)
    Path(path).rename(tmp_path / "viscot_363k.json")
    Path(sizes).rename(tmp_path / "gqa.jsonl")
    run("convert", "--from", "sharegpt", "--to", "visrl", "data/demo_rl_data.json", "preferences.jsonl")
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["visrl", "data"], command
        run(*words[2:])


def test_every_row_shown_in_the_documentation_is_good(tmp_path):
    text = (ROOT / "docs" / "DATA.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- (\S+) -->\n```json\n(.*?)```", text, flags=re.S)
    assert {name for name, _ in shown} >= {
        "viscot", "viscot-meta", "viscot-detection", "refcoco", "sharegpt", "visrl",
    }  # fmt: skip
    sizes = write_lines(tmp_path / "sizes.jsonl", [
        {"img_path": "cot/gqa/2316539.jpg", "width": 391, "height": 500},
    ])  # fmt: skip
    for name, block in shown:
        rows = [json.loads(line) for line in block.splitlines()]
        path = write_lines(tmp_path / "rows.jsonl", rows)
        report = json.loads(run("check", "--from", name, "--sizes", sizes, "--json", path).stdout)
        assert report["good"] == len(rows), (name, report)


def test_counts_hold_for_many_rows(tmp_path):
    """The faults of a file are those that were put in, however many good rows stand between."""
    path, sizes, rows = benchmark(tmp_path, good=500)
    report = json.loads(run("check", "--from", "viscot", "--sizes", sizes, "--json", path).stdout)
    assert report["rows"] == 500 + len(BAD) == len(rows)
    assert report["bad"] == COUNTS
    assert len(good_boxes(500)) == report["good"]


# --- Statistics -----------------------------------------------------------------------------------------------------


def test_stats_count_what_is_there(tmp_path):
    rows = [meta(i // 2, [[0, 0, 50, 50]], (100, 100)) for i in range(6)]
    page = tmp_path / "page.html"
    text = run("stats", "--from", "viscot-meta", "--html", page, write_lines(tmp_path / "a.jsonl", rows)).stdout
    assert "6 rows, 0 bad, 3 pictures" in text
    table = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert table["questions per picture"][:2] == ["3", "2"]
    assert table["box area, share of picture"][:2] == ["6", "0.25"]
    html = page.read_text()
    assert html.count("<svg") == html.count("</svg>") >= 5
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>', "", html)


def test_stats_count_tokens_under_the_pixel_limits(tmp_path):
    from visrl.models.tiny.make import make_tiny

    checkpoint = make_tiny(tmp_path / "tiny")
    path = write_lines(tmp_path / "a.jsonl", [meta(0, [[0, 0, 224, 112]], (448, 448))])
    limits = ("--model", checkpoint, "--image-max-pixels", 224 * 224, "--crop-max-pixels", 112 * 56)
    text = run("stats", "--from", "viscot-meta", *limits, path).stdout
    table = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert table["picture, tokens"][1] == "64"  # 224 × 224 in merged patches of 28
    assert table["crop, tokens"][1] == "8"  # 112 × 56
    assert float(table["question and answer, tokens"][1]) > 3
