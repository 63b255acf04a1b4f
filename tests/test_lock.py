"""requirements.lock, with which pip takes only the very files that were looked up: pip install --require-hashes -r ...

It is what requirements.txt pins and all that these need, each with its hashes, made by the command in its first lines.
"""

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
COMMAND = "uv pip compile requirements.txt --generate-hashes --universal --python-version 3.11 -o requirements.lock"
STALE = f"requirements.lock isn't that of requirements.txt: pip install uv, then {COMMAND}"


def locked() -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Each package's entries, one a platform where these differ, with their hashes."""
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for entry in re.split(r"\n(?=[a-z])", re.sub(r"^ *#.*\n", "", LOCK, flags=re.MULTILINE)):
        pin, *hashes = re.split(r"\s*\\\n\s*", entry.strip())
        requirement = Requirement(pin)
        found.setdefault(canonicalize_name(requirement.name), []).append((requirement, hashes))
    return found


def test_every_entry_has_a_version_and_hashes_and_no_place() -> None:
    entries = [entry for several in locked().values() for entry in several]
    assert len(entries) > 50
    for requirement, hashes in entries:
        assert re.fullmatch(r"==[\w.+!]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", part) for part in hashes), requirement
    assert "://" not in LOCK and "index" not in LOCK and "+cpu" not in LOCK
    assert COMMAND in LOCK


def test_it_pins_what_requirements_pins() -> None:
    for wanted in map(Requirement, pins()):
        versions = {str(requirement.specifier) for requirement, _ in locked()[canonicalize_name(wanted.name)]}
        assert versions == {str(wanted.specifier)}, STALE


def test_it_holds_all_that_these_need() -> None:
    """Nothing is left that pip would have to find without a hash: it would refuse all of it."""
    open_names, seen = {canonicalize_name(Requirement(line).name) for line in pins()}, set[str]()
    while open_names:
        name = open_names.pop()
        assert name in locked(), f"{name} is missing. {STALE}"
        seen.add(name)
        for line in metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                other = canonicalize_name(needed.name)
                for requirement, _ in locked().get(other, []):
                    version = str(requirement.specifier).removeprefix("==")
                    assert needed.specifier.contains(version, prereleases=True), f"{name} needs {needed}. {STALE}"
                open_names |= {other} - seen
    assert len(seen) > 30


def pins() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]
