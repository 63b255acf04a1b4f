"""Text files: each document once, in an order set by seed and epoch, resumed exactly from every cursor."""

import bz2
import errno
import gzip
import io
import json
import os
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from reading import assert_resumes_everywhere, read, texts, write_rows

from moelet.errors import UserError
from moelet.sections import DataSettings
from moelet.text import decompress, tables
from moelet.text import files as text_files
from moelet.text.documents import Document, Skipped
from moelet.text.sources import SOURCES


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


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}


def write_table(path: Path, column: object, **options: object) -> Path:
    parquet.write_table(pa.table({"id": list(range(len(column))), "text": column}), path, **options)
    return path


def outcome(settings: DataSettings) -> tuple[list[str], list[tuple[str, str]]]:
    """Read from every cursor; return the texts, and what was skipped: the reason, and the file and row."""
    whole = [item for item, _ in assert_resumes_everywhere(settings)]
    skipped = [(item.reason, Path(item.where).name) for item in whole if isinstance(item, Skipped)]
    return [item.text for item in whole if isinstance(item, Document)], skipped


def test_a_folder_of_every_kind_gives_each_document_once(tmp_path: Path) -> None:
    expected = []
    for ending in (".txt", ".md", ".py", ".jsonl", ".ndjson"):
        for around, compress in {"": bytes, **COMPRESSED}.items():
            found = [f"{ending}{around} {k}" for k in range(3 if "json" in ending else 1)]
            lines = [json.dumps({"text": text}) if "json" in ending else text for text in found]
            (tmp_path / f"one.x{ending}{around}").write_bytes(compress("\n".join(lines).encode()))
            expected += found
    write_table(tmp_path / "one.parquet", ["t0", "t1", "t2"])
    for name in ("no.gz", "no.json", "no.parquet.gz", "no.txt.xz", "no.txt.gz.gz", "txt.zst"):
        (tmp_path / name).write_text("not read")
    found, skipped = outcome(files(tmp_path))
    assert sorted(found) == sorted([*expected, "t0", "t1", "t2"]) and skipped == []


def test_a_link_is_read_by_its_own_ending(tmp_path: Path) -> None:
    """The cache of the Hugging Face Hub links names to blobs that have no ending."""
    (tmp_path / "blobs").mkdir()
    named = tmp_path / "snapshots" / "0123abcd"
    named.mkdir(parents=True)
    for name, data in {"a.jsonl.gz": gzip.compress(b'{"text": "row"}'), "b.txt": b"plain"}.items():
        (tmp_path / "blobs" / name[0]).write_bytes(data)
        (named / name).symlink_to(f"../../blobs/{name[0]}")
    write_table(tmp_path / "blobs" / "c", ["cell"])
    for name in ("c.parquet", "again.parquet"):
        (named / name).symlink_to("../../blobs/c")
    assert sorted(texts(files(named))) == ["cell", "plain", "row"]
    assert [item.name for item, _ in read(files(named / "*.parquet"))] == [f"{named}/again.parquet:1"]


def test_links_out_of_a_folder_and_pipes_are_left_out_with_a_word(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe would be waited for, a device never end, and a link may lead to what its maker may not read."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "deep").mkdir()
    for name in ("secret.txt", "deep/secret.txt"):
        (outside / name).write_text("secret")
    expected = sorted(texts(files(folder)))
    links = {"out.txt": outside / "secret.txt", "zero.txt": Path("/dev/zero"), "deep/up.txt": Path("../../secret.txt")}
    for name, target in {**links, "loop.txt": Path("loop.txt"), "away": outside / "deep"}.items():
        (folder / name).symlink_to(target)
    (folder / "inside.txt").symlink_to("a.txt")
    os.mkfifo(folder / "pipe.jsonl")
    for named in ([folder], [folder / "**" / f"*.{ending}" for ending in ("txt", "md", "py", "jsonl")]):
        text_files._tell.cache_clear()
        caplog.clear()
        assert sorted(texts(files(*named))) == expected
        for name in (*links, "loop.txt", "pipe.jsonl"):
            assert f"{folder / name} is left out" in caplog.text, (named, name)
    with pytest.raises(UserError, match="pipe.jsonl is a pipe. It must be a file"):
        read(files(folder / "pipe.jsonl"))
    with pytest.raises(UserError, match="no file matches"):
        read(files(folder / "out*.txt"))
    assert texts(files(folder / "out.txt")) == ["secret"]  # whoever names a link means it
    (outside / "mine").symlink_to(folder)
    assert sorted(texts(files(outside / "mine"))) == expected


@pytest.mark.parametrize("around", COMPRESSED)
def test_concatenated_members_are_one_text(around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PART", 64)
    monkeypatch.setattr(decompress, "BLOCK", 16)
    rows = "".join(
        json.dumps({"text": f"{k} é😀 " * (k % 5 + 1)}, ensure_ascii=False) + "\n" for k in range(20)
    ).encode()
    members = [rows[:100], b"", rows[100:331], rows[331:333], rows[333:]]  # cut in rows and in characters
    skippable = struct.pack("<II", 0x184D2A5E, 5) + b"other" if around == ".zst" else b""  # as pzstd puts before frames
    joined = skippable.join([b"", *map(COMPRESSED[around], members), b""])
    for ending in (".jsonl", ".txt"):
        (tmp_path / f"x{ending}").write_bytes(rows)
        (tmp_path / f"x{ending}{around}").write_bytes(joined)
        plain = assert_resumes_everywhere(files(tmp_path / f"x{ending}"))
        again = assert_resumes_everywhere(files(tmp_path / f"x{ending}{around}"))
        assert [cursor for _, cursor in again] == [cursor for _, cursor in plain] and len(plain) > 15
        assert [item.text for item, _ in again] == [item.text for item, _ in plain]


@pytest.mark.parametrize("around", COMPRESSED)
def test_rows_before_damage_stay_and_the_next_file_goes_on(
    around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decompress, "BLOCK", 64)
    monkeypatch.setattr(text_files, "BLOCK", 50)  # of the buffer, whose reads fall across the blocks
    rows = [f"row {k} {k**9}" for k in range(60)]
    lines = [json.dumps({"text": row}).encode() + b"\n" for row in rows]
    members = [COMPRESSED[around](b"".join(lines[k : k + 20])) for k in (0, 20, 40)]
    whole, first = b"".join(members), len(members[0])
    path = tmp_path / f"broken.jsonl{around}"
    for name in ("after1.txt", "after2.txt"):  # one of them comes after it
        (tmp_path / name).write_text(name)
    reached = set()
    for cut in (1, 9, first // 2, first - 1, first + 3, first + len(members[1]) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:cut])
        found, skipped = outcome(files(tmp_path))
        kept = [text for text in found if text.startswith("row")]
        assert kept == rows[: len(kept)] and len(found) == len(kept) + 2
        assert skipped == [("damaged", path.name)]
        reached.add(len(kept))
    assert min(reached) == 0 and max(reached) > 35 and len(reached) > 2
    path.write_bytes(whole[:first] + b"\xff" + whole[first + 1 :])  # what should begin the second member
    found, skipped = outcome(files(path))
    assert found == rows[: len(found)] and 15 < len(found) <= 20 and skipped == [("damaged", path.name)]
    path.write_bytes(whole[:first])  # a cut between members leaves no trace
    assert outcome(files(path)) == (rows[:20], [])


@pytest.mark.parametrize("around", COMPRESSED)
def test_a_damaged_text_is_skipped_whole(around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PART", 200)
    whole = COMPRESSED[around]("".join(f"line {k} {k**9}\n" for k in range(99)).encode())
    (tmp_path / f"a.txt{around}").write_bytes(whole + whole[:-5])
    (tmp_path / f"b.txt{around}").write_bytes(COMPRESSED[around](b"good line\n" * 99 + b"\xff"))
    (tmp_path / f"c.txt{around}").write_bytes(whole)
    (tmp_path / f"d.txt{around}").write_bytes(b"plain text")
    (tmp_path / f"e.txt{around}").write_bytes(b"")
    found, skipped = outcome(files(tmp_path))
    assert found[0].startswith("line 0 ") and found[-1].splitlines()[-1].startswith("line 98 ") and len(found) > 5
    reasons = {"a": "damaged", "b": "invalid UTF-8", "d": "damaged", "e": "empty"}
    assert sorted(skipped, key=lambda skip: skip[1]) == [(why, f"{x}.txt{around}") for x, why in reasons.items()]


@pytest.mark.parametrize("around", COMPRESSED)
def test_a_decompression_bomb_is_not_held(around: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PART", 2**20)
    monkeypatch.setattr(text_files, "LARGEST_ROW", 2**20)
    size = 96 * 2**20
    bomb = COMPRESSED[around](b"\0" * 2**24) * (size // 2**24)
    for name in (f"bomb.txt{around}", f"bomb.jsonl{around}"):
        (tmp_path / name).write_bytes(bomb)
    length, held = 0, 0
    tracemalloc.start()
    try:
        for item, _ in SOURCES["files"].documents(files(tmp_path), 0, 0, None):
            held = max(held, pa.total_allocated_bytes())
            length += len(item.text) if isinstance(item, Document) else 0
            assert isinstance(item, Document) or item.reason == "over-long"
        held += tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert length == size and held < 12 * 2**20


def test_a_table_goes_on_at_its_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 3)
    rows = [f"row {k}" for k in range(25)]
    path = write_table(tmp_path / "rows.parquet", rows, row_group_size=10)
    whole = assert_resumes_everywhere(files(path))
    assert [(item.text, item.name) for item, _ in whole] == [(row, f"{path}:{k}") for k, row in enumerate(rows, 1)]
    assert [cursor["offset"] for _, cursor in whole] == [0] * 9 + [1] * 10 + [2] * 5 + [3]
    data = path.read_bytes()
    column = parquet.read_metadata(path).row_group(1).column(0)
    begin = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
    path.write_bytes(data[:4] + bytes(begin - 4) + data[begin:])  # without the first row group
    assert [item for item, _ in read(files(path))] == [Skipped("damaged", str(path))]
    for k in range(9, 25):
        assert read(files(path), cursor=whole[k][1]) == whole[k + 1 :]


def test_each_value_of_a_table_is_text_or_skipped_with_its_reason(tmp_path: Path) -> None:
    values = ["good", None, "", " \n", "caf\u00e9 \0 😀", "good"]
    reasons = [None, "not text", "empty", "empty", None, None]
    bad = pa.array([b"good", b"\xff", b"good"]).view(pa.string())
    columns = {
        **{str(kind): (pa.array(values, kind), reasons) for kind in (pa.string(), pa.large_string(), pa.string_view())},
        "dictionary": (pa.array(values).dictionary_encode(), reasons),
        "bad": (bad, [None, "invalid UTF-8", None]),
        "binary": (pa.array([b"x", None]), ["not text"] * 2),
        "list": (pa.array([["x"], None]), ["not text"] * 2),
        "time": (pa.array([1, 2**62]).view(pa.timestamp("us")), ["not text"] * 2),  # Python has no such year
        "null": (pa.array([None, None]), ["not text"] * 2),
        "none": (pa.array([], pa.string()), []),
    }
    for name, (column, expected) in columns.items():
        path = write_table(tmp_path / f"{name}.parquet", column)
        whole = [item for item, _ in assert_resumes_everywhere(files(path))]
        assert [item.reason if isinstance(item, Skipped) else None for item in whole] == expected, name
        found = [item.text for item in whole if isinstance(item, Document)]
        assert found == (["good", "caf\u00e9 \0 😀", "good"] if expected is reasons else ["good"] * len(found)), name
    path = tmp_path / "nested.parquet"
    parquet.write_table(pa.table({"text": [{"x": "inner"}], "text.x": ["outer"]}), path)
    assert texts(files(path, field="text.x")) == ["outer"]
    assert [item for item, _ in read(files(path))] == [Skipped("not text", f"{path}:1")]


def test_a_damaged_table_is_skipped_from_there_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 4)
    rows = [f"row {k}" for k in range(25)]
    path = write_table(tmp_path / "rows.parquet", rows, row_group_size=10)
    for name in ("after1.txt", "after2.txt"):
        (tmp_path / name).write_text(name)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    breaks = [whole[:cut] for cut in (0, 3, 4, 12, len(whole) // 2, len(whole) - footer, len(whole) - 1)]
    breaks += [b"this is no table\n" * 9, whole[:-footer] + b"\xff" * (footer - 8) + whole[-8:]]
    for data in breaks:
        path.write_bytes(data)
        found, skipped = outcome(files(tmp_path))
        assert sorted(found) == ["after1.txt", "after2.txt"] and skipped == [("damaged", path.name)]
    column = parquet.read_metadata(write_table(path, rows, row_group_size=10)).row_group(1).column(1)
    begin = column.dictionary_page_offset or column.data_page_offset
    path.write_bytes(whole[:begin] + bytes(20) + whole[begin + 20 :])
    found, skipped = outcome(files(tmp_path))
    assert [text for text in found if text.startswith("row")] == rows[:10] and len(found) == 12
    assert skipped == [("damaged", path.name)]


def test_a_wrong_byte_anywhere_in_a_table_loses_no_row_unsaid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 4)
    path = tmp_path / "rows.parquet"
    write_table(path, [f"row {k}" for k in range(25)], row_group_size=10, write_page_checksum=True, compression="none")
    whole = path.read_bytes()
    column = parquet.read_metadata(path).row_group(0).column(1)
    pages = range(column.dictionary_page_offset, column.dictionary_page_offset + column.total_compressed_size)
    footer = range(len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"), len(whole))
    for place in (*pages, *footer):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 8]) + whole[place + 1 :])
        with suppress(UserError):  # it was in the column's name
            items = [item for item, _ in (assert_resumes_everywhere if place % 16 == 0 else read)(files(path))]
            if items[-1:] == [Skipped("damaged", str(path))]:
                continue
            names = [item.name if isinstance(item, Document) else item.where for item in items]
            assert names == [f"{path}:{k}" for k in range(1, len(items) + 1)]
            assert {item.text for item in items if isinstance(item, Document)} <= {f"row {k}" for k in range(25)}


def test_a_failing_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

        readinto = readline = read

    for name in ("a.txt", "b.txt.gz", "c.jsonl", "d.parquet"):
        (tmp_path / name).write_bytes(b"")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
            patch.setattr(text_files, "_open", lambda _: Failing(b"PAR1" * 9))
            read(files(tmp_path / name))


def test_a_missing_column_is_an_error_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    write_table(tmp_path / "b.parquet", ["good"])
    parquet.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "c.parquet")
    for seed in range(4):
        with pytest.raises(
            UserError, match=r"c\.parquet has no field 'text'\. Its fields are: 'body', 'id'\. Set data"
        ):
            next(SOURCES["files"].documents(files(tmp_path), seed, 0, None))
    assert texts(files(tmp_path / "c.parquet", field="body")) == ["x"]
    for around, compress in COMPRESSED.items():
        path = tmp_path / f"rows.jsonl{around}"
        path.write_bytes(compress(b'{"body": "x", "id": 1}\n{"text": "y"}\n'))
        with pytest.raises(UserError, match=r"row 1 of .*rows\.jsonl\..* has no field 'text'.* 'body', 'id'"):
            read(files(path))


def test_files_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file matches") as caught:
        read(files(tmp_path / "*.txt"))
    assert "*.txt" in str(caught.value) and os.getcwd() in str(caught.value)
    with pytest.raises(UserError, match="no file matches"):
        read(files(tmp_path))
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(
        UserError, match=r"table\.csv doesn't end in \.txt, \.md, \.py, \.jsonl.*\.zst.* or \.parquet\. "
    ):
        read(files(tmp_path / "table.csv"))
    (tmp_path / "table.parquet.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"table\.parquet\.gz doesn't end in"):
        read(files(tmp_path / "table.parquet.gz"))
    path = write_rows(tmp_path / "rows.jsonl", {"body": "x", "id": 1}, {"text": "y"})
    with pytest.raises(UserError, match=r"row 1 of .*rows\.jsonl has no field 'text'.* 'body', 'id'"):
        read(files(path))
    assert [type(item) for item, _ in read(files(path, field="body"))] == [Document, Skipped]
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone\.txt can't be read \(No such file"):
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
    (folder / "long.txt").write_bytes(b"x" * 200_000 + b"y" + b"x" * 200_000)
    before = fingerprint(files(folder / "long.txt"))
    (folder / "long.txt").write_bytes(b"x" * 200_000 + b"z" + b"x" * 200_000)
    assert fingerprint(files(folder / "long.txt")) != before


def test_of_more_text_than_is_read_for_it_the_fingerprint_follows_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "SAMPLE", 10)
    monkeypatch.setattr(text_files, "SAMPLED", 100)
    data = bytearray(b"x" * 1000)

    def fingerprint() -> str:
        (tmp_path / "a.txt").write_bytes(data)
        return SOURCES["files"].fingerprint(files(tmp_path))

    found = [fingerprint()]
    for place in (0, 9, 113, 999):  # of ten blocks of 10 bytes, evenly spread
        data[place] ^= 1
        found.append(fingerprint())
    assert len(set(found)) == 5
    data[50] ^= 1
    assert fingerprint() == found[-1]
    data.append(0)
    assert fingerprint() != found[-1]
