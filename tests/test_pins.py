"""What is installed is written down: pins for every package, within the ranges that pyproject.toml allows."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PIN = re.compile(r"([A-Za-z0-9_.-]+)==([A-Za-z0-9_.!+-]+)")


def pins(name: str) -> dict[str, str]:
    """Version by package of a file of constraints, every line of which is a comment or a pin."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    found = [PIN.fullmatch(line) for line in lines]
    assert None not in found, [line for line, match in zip(lines, found, strict=True) if match is None]
    return {canonicalize_name(match[1]): match[2] for match in found if match is not None}


def direct() -> list[Requirement]:
    """What pyproject.toml asks for to run the demo and the tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_every_requirement_is_pinned_within_its_range(name):
    pinned = pins(name)
    assert {"pip", "setuptools"} <= set(pinned)
    for requirement in direct():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_the_oldest_pins_are_the_lower_bounds():
    pinned = pins("constraints-oldest.txt")
    for requirement in direct():
        lower = [part.version for part in requirement.specifier if part.operator == ">="]
        assert len(lower) == 1, f"{requirement} names no lowest release that is tested"
        lowest, pinned_at = Version(lower[0]).release, Version(pinned[canonicalize_name(requirement.name)]).release
        assert pinned_at[: len(lowest)] == lowest, requirement


def test_what_the_installed_packages_need_is_pinned_too():
    pinned = {*pins("constraints.txt"), *pins("constraints-oldest.txt")}
    waiting, seen = direct(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in pinned, f"{name} is installed and not pinned: `make pins` writes constraints.txt anew"
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                waiting.append(needed)
    assert len(seen) > 30
