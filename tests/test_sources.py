"""The embedded source and mixes: the order, the shares, and resuming from any cursor."""

import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from reading import assert_resumes_everywhere, read, write_rows

from moelet.errors import UserError
from moelet.sections import DataSettings, MixedSource
from moelet.text.documents import Document, Skipped
from moelet.text.sources import SOURCES, mix_shares


def test_embedded_is_the_standard_library_and_resumes() -> None:
    settings = DataSettings()
    whole = read(settings, 3, 1)
    names = [item.name if isinstance(item, Document) else item.where for item, _ in whole]
    assert len(names) == len(set(names)) > 500
    assert {"argparse.py", "json/decoder.py", "help(if)"} <= set(names)
    assert "pydoc_data/topics.py" not in names
    assert not any({"site-packages", "test", "tests", "idle_test"} & set(name.split("/")) for name in names)
    assert {item.reason for item, _ in whole if isinstance(item, Skipped)} <= {"empty", "invalid UTF-8", "unreadable"}
    for k in (0, 1, 99, len(whole) - 2, len(whole) - 1):
        rest = SOURCES["embedded"].documents(settings, 3, 1, whole[k][1])
        assert list(islice(rest, 20)) == whole[k + 1 : k + 21]
    other = read(settings, 3, 2)
    assert other != whole and sorted(item for item, _ in other) == sorted(item for item, _ in whole)
    fingerprint = SOURCES["embedded"].fingerprint(settings)
    assert len(fingerprint) == 64 and fingerprint == SOURCES["embedded"].fingerprint(settings)


# mixes


def part(path: Path, weight: float) -> MixedSource:
    return MixedSource(source="files", files=str(path), weight=weight)


def mix(*parts: MixedSource, unit: Any = "documents") -> DataSettings:
    return DataSettings(source="mix", mix=list(parts), mix_unit=unit)


def documents(settings: DataSettings, count: int | None = None) -> Iterator[Document]:
    items = (item for item, _ in SOURCES["mix"].documents(settings, 3, 0, None))
    return islice((item for item in items if isinstance(item, Document)), count)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Files of 7, 20 and 3 rows; those of b are the longest, and one row of c is bad."""
    sizes = {"a": (7, 10), "b": (20, 400), "c": (3, 40)}
    rows = {name: [{"text": f"{name}{k} " + "x" * length} for k in range(n)] for name, (n, length) in sizes.items()}
    rows["c"].insert(1, {"text": ""})
    return [write_rows(tmp_path / f"{name}.jsonl", *found) for name, found in rows.items()]


def test_a_mix_resumes_everywhere(three: list[Path]) -> None:
    whole = assert_resumes_everywhere(mix(*map(part, three, (0.5, 2.0, 1.0))))
    found = Counter(item.text.split()[0] for item, _ in whole if isinstance(item, Document))
    assert set(found) == {f"{name}{k}" for name, n in (("a", 7), ("b", 20), ("c", 3)) for k in range(n)}
    assert all(found[f"b{k}"] >= 1 for k in range(20)) and found["c0"] > 1, "short parts start over"
    assert {item.part for item, _ in whole if isinstance(item, Document)} == {0, 1, 2}
    assert sum(isinstance(item, Skipped) for item, _ in whole) >= 2


def test_shares_are_never_off_by_more_than_a_document(three: list[Path]) -> None:
    weights = (0.13, 0.51, 0.36)
    taken = [0, 0, 0]
    for count, item in enumerate(documents(mix(*map(part, three, weights))), 1):
        taken[item.part] += 1
        assert all(abs(n - weight * count) <= 1 for n, weight in zip(taken, weights, strict=True))
    assert count > 30


@pytest.mark.parametrize("unit", ["documents", "characters"])
def test_ten_thousand_documents_hit_their_weights_within_a_percent(tmp_path: Path, unit: str) -> None:
    sizes = [30, 700, 150]
    paths = [tmp_path / f"{k}.jsonl" for k in range(3)]
    for k, path in enumerate(paths):
        write_rows(path, *({"text": "x" * (sizes[k] + row % 50)} for row in range(9000 if k == 0 else 500)))
    settings = mix(*map(part, paths, (5, 3, 2)), unit=unit)
    counts = [[0, 0, 0], [0, 0, 0]]
    for item in documents(settings, 10_000):
        counts[0][item.part] += 1
        counts[1][item.part] += len(item.text)
    assert sum(counts[0]) == 10_000
    shares = mix_shares(settings, *counts)
    assert all(abs(share[unit] - share["asked"]) < 0.01 for share in shares)
    assert max(abs(share["documents"] - share["characters"]) for share in shares) > 0.2, "the units differ here"


def test_a_part_that_starts_over_comes_in_another_order(tmp_path: Path) -> None:
    for k in range(9):
        (tmp_path / f"{k}.txt").write_text(f"small {k}")
    large = write_rows(tmp_path / "large.jsonl", *({"text": f"large {k}"} for k in range(27)))
    settings = mix(part(tmp_path / "*.txt", 1), part(large, 1))
    small = [item.text for item in documents(settings) if item.part == 0]
    passes = [tuple(small[start : start + 9]) for start in (0, 9, 18)]
    assert len(set(passes)) == 3 and all(sorted(found) == sorted(passes[0]) for found in passes)


def test_a_part_without_text_is_named(tmp_path: Path, three: list[Path]) -> None:
    empty = write_rows(tmp_path / "empty.jsonl", {"text": ""}, {"text": " "})
    with pytest.raises(UserError, match=r"source 1 of data\.mix \(.*empty\.jsonl.*\) holds no text"):
        read(mix(part(three[0], 1), part(empty, 1)))


def test_the_fingerprint_of_a_mix_follows_its_parts(three: list[Path]) -> None:
    fingerprint = SOURCES["mix"].fingerprint
    one = mix(*map(part, three, (1, 2, 3)))
    others = [
        mix(*map(part, three, (1, 2, 4))),
        mix(*map(part, three[:2], (1, 2))),
        mix(*one.mix or [], unit="characters"),
    ]
    assert len({fingerprint(settings) for settings in [one, *others]}) == 4
    three[1].write_text(json.dumps({"text": "another"}))
    assert fingerprint(mix(*map(part, three, (1, 2, 3)))) != fingerprint(others[0])


def test_parts_are_pinned_to_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = mix(MixedSource(source="files", files="a.txt"), MixedSource(source="embedded"))
    pinned = SOURCES["mix"].pin(settings)
    assert [found.files for found in pinned.mix] == [[str(tmp_path / "a.txt")], None]
