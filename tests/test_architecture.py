"""The order of the house: a room uses only what stands above it, and no two files use each other."""

import ast
import pkgutil
import re
import runpy
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ORDER = (
    "callable_package",
    "errors", "yaml_text", "redact", "foreign", "config", "plugins", "failures", "box", "prompts", "replies",
    "sequences", "statistics", "progress", "records", "codecs", "pages", "scenes", "data_url", "image_files",
    "image_modes", "image_rows", "images", "manifest", "conversation", "zoom", "data", "models", "packing", "engines",
    "rollout", "rewards", "policy", "train", "evaluate", "report", "evolve", "serve", "environment", "cli",
)  # fmt: skip


def uses() -> dict[str, set[str]]:
    """For every file of the package, as a dotted name, the files that it imports anywhere in its text."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "visrl").rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & files.keys()
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} imports by a relative name"
                modules = {f"{node.module}.{alias.name}" for alias in node.names} & files.keys()
                found[name] |= modules or ({str(node.module)} & files.keys())
    return found


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_import_goes_up_the_house():
    places = {"": -1} | {name: place for place, name in enumerate(ORDER)}
    assert {room(name) for name in uses()} == places.keys()
    wrong = [
        f"{name} uses {used}" for name, all_used in uses().items() for used in all_used
        if places[room(used)] > places[room(name)] and name != "visrl"
    ]  # fmt: skip
    assert not wrong


def test_the_front_door_names_modules_and_imports_none():
    """Every module stands below it: it may name them in its table and to type checkers, and import none."""
    tree = ast.parse((ROOT / "visrl" / "__init__.py").read_text(encoding="utf-8"))
    typed = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    hidden = {node for block in typed for node in ast.walk(block)}
    real = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in hidden]
    assert {ast.unparse(node).split()[1] for node in real} == {"importlib", "typing"}


def test_no_two_files_use_each_other():
    files = {name: {used for used in all_used if used != "visrl"} for name, all_used in uses().items()}
    assert set(TopologicalSorter(files).static_order()) == files.keys()


def test_no_two_classes_have_one_name():
    places: dict[str, list[str]] = {}
    for path in (ROOT / "visrl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


# --- docs/ARCHITECTURE.md and its picture -----------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")


def test_the_picture_of_the_house_shows_its_order():
    drawn = runpy.run_path(str(ROOT / "docs" / "images" / "house.py"))
    lines = {room: number for number, (rooms, _) in enumerate(drawn["ROOMS"]) for room in rooms}
    assert lines.keys() == set(ORDER)
    for user, all_used in uses().items():
        for used in all_used - {"visrl"}:
            assert user == "visrl" or lines[room(used)] <= lines[room(user)], f"{user} uses {used}, drawn below it"
    assert (ROOT / "docs" / "images" / "house.svg").read_text(encoding="utf-8") == drawn["draw"]()


@pytest.mark.parametrize("name", sorted(set(re.findall(rf"`((?:{'|'.join(ORDER)})\.[\w.]+)`", PAGE))))
def test_what_the_page_names_is_there(name: str):
    assert pkgutil.resolve_name(f"visrl.{name}") is not None


def test_every_file_that_the_page_names_is_there():
    for path in re.findall(r"`((?:tests|docs|visrl)/[\w/.]+)`|\]\(([\w/.]+)\)", PAGE):
        assert (ROOT / path[0]).exists() if path[0] else (ROOT / "docs" / path[1]).exists(), path


@pytest.mark.parametrize("folder", sorted(name for name in ORDER if (ROOT / "visrl" / name).is_dir() and name != "cli"))
def test_a_folder_opens_with_the_map_of_its_files(folder: str):
    opening = ast.get_docstring(ast.parse((ROOT / "visrl" / folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    files = {path.stem for path in (ROOT / "visrl" / folder).glob("*.py")} - {"__init__"}
    assert files <= set(re.findall(r"\w+", opening))
