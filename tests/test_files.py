"""Text files: each document once, in an order set by seed and epoch, resumed exactly from every cursor."""

import os
from pathlib import Path

import pytest
from reading import assert_resumes_everywhere, read, texts, write_rows

from moelet import files as text_files
from moelet.documents import Document, Skipped
from moelet.errors import UserError
from moelet.hparams import DataSettings
from moelet.sources import SOURCES


def files(*patterns: object, field: str = "text") -> DataSettings:
    return DataSettings(source="files", files=[str(pattern) for pattern in patterns], text_field=field)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven files with ten documents, an empty file, and some that are no text."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "secret.txt").write_text("secret")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\r\nline\n")
    (tmp_path / "b.md").write_text("# second")
    (tmp_path / "deep" / "c.py").write_text("third = 3\n")
    (tmp_path / "deep" / "er" / "nothing.txt").write_text("")
    write_rows(tmp_path / "d.jsonl", {"text": "d1"}, {"text": "d2", "id": 2}, {"text": " "}, {"text": "d3"})
    write_rows(tmp_path / "deep" / "e.jsonl", *({"text": f"e{k}"} for k in range(3)))
    (tmp_path / "deep" / "f.jsonl").write_text('{"text": "f, whose last row has no newline"}')
    return tmp_path


def test_files_come_once_each_and_resume_everywhere(folder: Path) -> None:
    whole = assert_resumes_everywhere(files(folder))
    found = sorted(item.text for item, _ in whole if isinstance(item, Document))
    rows = ["d1", "d2", "d3", "e0", "e1", "e2", "f, whose last row has no newline"]
    assert found == sorted(["first\r\nline\n", "# second", "third = 3\n", *rows])
    skipped = [item for item, _ in whole if isinstance(item, Skipped)]
    assert sorted((item.reason, Path(item.where).name) for item in skipped) == [
        ("empty", "d.jsonl:3"),
        ("empty", "nothing.txt"),
    ]


def test_the_order_of_files_depends_on_seed_and_epoch(folder: Path) -> None:
    orders = {(seed, epoch): texts(files(folder), seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len({tuple(order) for order in orders.values()}) > 5
    assert all(sorted(order) == sorted(orders[0, 0]) for order in orders.values())
    assert texts(files(folder), 2, 1) == orders[2, 1]
    assert [text for text in orders[0, 0] if text[0] == "e"] == ["e0", "e1", "e2"]


def test_paths_globs_and_folders_together_name_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = texts(files(folder))
    assert texts(files(folder / "*.md", folder / "deep" / "..", folder / "a.txt")) == everything
    monkeypatch.chdir(folder)
    assert texts(DataSettings(source="files", files="*.md")) == ["# second"]
    assert sorted(texts(files("**/*.jsonl"))) == sorted(
        text for text in everything if text[0] in "de" or text[:2] == "f,"
    )
    (folder / "[1].txt").write_text("brackets")
    assert texts(files("[1].txt")) == ["brackets"]


def test_long_text_comes_in_parts_cut_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PART", 20)
    long = "".join(f"line {k}: é\n" for k in range(9))
    unbroken = "€😀é" * 15
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + long.encode())
    (tmp_path / "unbroken.txt").write_text(unbroken, encoding="utf-8")
    (tmp_path / "exact.txt").write_text("x" * 20)
    by_name: dict[str, list[Document]] = {}
    for item, _ in assert_resumes_everywhere(files(tmp_path)):
        by_name.setdefault(Path(item.name).name, []).append(item)
    for name, text in {"long.txt": long, "unbroken.txt": unbroken, "exact.txt": "x" * 20}.items():
        parts = by_name[name]
        assert "".join(part.text for part in parts) == text
        assert [part.starts for part in parts] == [True] + [False] * (len(parts) - 1)
        assert [part.ends for part in parts] == [False] * (len(parts) - 1) + [True]
        assert all(len(part.text.encode()) <= 20 for part in parts)
    assert len(by_name["exact.txt"]) == 1 and len(by_name["long.txt"]) > 4
    assert all(part.text.endswith("\n") for part in by_name["long.txt"])


def test_a_long_file_with_a_bad_byte_near_its_end_is_skipped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PART", 20)
    (tmp_path / "bad.txt").write_bytes(b"good line\n" * 9 + b"\xff")
    (tmp_path / "cut.txt").write_bytes("good line\né".encode()[:-1])
    (tmp_path / "good.txt").write_text("good")
    whole = assert_resumes_everywhere(files(tmp_path))
    reasons = sorted(item.reason for item, _ in whole if isinstance(item, Skipped))
    assert len(whole) == 3 and reasons == ["invalid UTF-8"] * 2


def test_each_bad_row_is_skipped_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "LARGEST_ROW", 500_000)
    monkeypatch.setattr(text_files, "PART", 1000)
    rows: list[tuple[bytes, str | None]] = [
        (b'\xef\xbb\xbf{"text": "good"}', None),
        (b"", "empty"),
        (b'{"text": ""}', "empty"),
        (b'{"text": " \\n\\t "}', "empty"),
        (b'{"text": "\xff"}', "invalid UTF-8"),
        (b'{"text": "half', "invalid JSON"),
        (b"[" * 400_000, "invalid JSON"),
        (b'{"text": "big", "n": ' + b"1" * 5000 + b"}", "invalid JSON"),
        (b'{"body": "x"}', "no text field"),
        (b'["text"]', "no text field"),
        (b'{"text": null}', "not text"),
        (b'{"text": ["x"]}', "not text"),
        (b'{"text": "a\\ud800b"}', "lone surrogate"),
        (b'{"text": "' + b"x" * 500_000 + b'"}', "over-long"),
        (b'{"text": "' + b"x" * 499_987 + b'"}', None),
        (b'{"text": "\\u0000 \\ud83d\\ude00 caf\xc3\xa9"}\r', None),
        (b'{"text": "' + b"y" * 600_000, "over-long"),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in rows))
    whole = assert_resumes_everywhere(files(path))
    reasons = [item.reason if isinstance(item, Skipped) else None for item, _ in whole]
    assert reasons == [reason for _, reason in rows]
    places = [item.where if isinstance(item, Skipped) else item.name for item, _ in whole]
    assert places == [f"{path}:{row}" for row in range(1, len(rows) + 1)]
    assert [item.text[:20] for item, _ in whole if isinstance(item, Document)] == ["good", "x" * 20, "\0 😀 café"]


def test_files_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file matches") as caught:
        read(files(tmp_path / "*.txt"))
    assert "*.txt" in str(caught.value) and os.getcwd() in str(caught.value)
    with pytest.raises(UserError, match="no file matches"):
        read(files(tmp_path))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(UserError, match=r"table\.csv doesn't end in \.txt, \.md, \.py, \.jsonl"):
        read(files(tmp_path / "table.csv"))
    path = write_rows(tmp_path / "rows.jsonl", {"body": "x", "id": 1}, {"text": "y"})
    with pytest.raises(UserError, match=r"row 1 of .*rows\.jsonl has no field 'text'.* 'body', 'id'"):
        read(files(path))
    assert [type(item) for item, _ in read(files(path, field="body"))] == [Document, Skipped]
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"nowhere can't be read \(No such file"):
        read(files(tmp_path, field="body"))


def test_the_fingerprint_of_files_follows_names_text_and_field(folder: Path) -> None:
    fingerprint = SOURCES["files"].fingerprint
    before = fingerprint(files(folder))
    assert fingerprint(files(folder / "a.txt", folder)) == before
    assert fingerprint(files(folder, field="body")) != before
    assert fingerprint(files(folder / "deep")) != before
    (folder / "b.md").write_text("# Second")
    changed = fingerprint(files(folder))
    assert changed != before
    (folder / "b.md").rename(folder / "c.md")
    assert fingerprint(files(folder)) not in (before, changed)
    (folder / "long.txt").write_bytes(b"x" * 200_000 + b"y")
    one_end = fingerprint(files(folder / "long.txt"))
    (folder / "long.txt").write_bytes(b"x" * 200_000 + b"z")
    assert fingerprint(files(folder / "long.txt")) != one_end
