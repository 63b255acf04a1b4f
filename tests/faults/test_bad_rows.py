"""Rows, files and texts that are not what they should be: skipped and counted, or the run stops and says why.

Run by its path it is the victim: it reads mutated files and bombs, and says how each went and how much memory it took.
"""

import bz2
import gzip
import io
import json
import math
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from moelet.errors import UserError
from moelet.sections import DataSettings
from moelet.text.documents import Document, Skipped
from moelet.text.sources import SOURCES

if __name__ != "__main__":
    from conftest import TinySettings
    from cuts import Step, in_process, train_until  # noqa: F401  a fixture
    from processes import assert_same_run, newest, rows
    from reading import read
    from scorecard import Trials

COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
Row = tuple[bytes, str | None]  # a line of a .jsonl file, and the reason for which it is skipped
LETTERS = 'abc  \n\t"\\é日😀\u200d\u202e\u0301\0\ufeff\u2028\u2581<s>'
MEGABYTE = 2**20


def some_text(draw: random.Random) -> str:
    return "x" + "".join(draw.choice(LETTERS) for _ in range(draw.randrange(60)))


def good(draw: random.Random) -> Row:
    record = {"id": draw.randrange(9), "text": some_text(draw)}
    return json.dumps(record, ensure_ascii=draw.random() < 0.5).encode(), None


NO_UTF8 = (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80")
NO_TEXT: tuple[Any, ...] = (None, 7, 0.5, True, [], ["x"], {}, {"text": "x"})
NO_FIELD = (b'{"body": "x"}', b"{}", b'["text"]', b'"text"', b"7", b"null", b"true")
EMPTY = (b"", b" ", b"\t \r", b'{"text": ""}', b'{"text": " \\n\\t "}', b'{"text": "\\u3000"}')
KINDS: list[Callable[[random.Random], Row]] = [
    good,
    lambda draw: (b'{"text": "' + draw.choice(NO_UTF8) + b'"}', "invalid UTF-8"),
    lambda draw: (b'{"text": "\\u' + draw.choice([b"d800", b"dfff", b"dbff x"]) + b'"}', "lone surrogate"),
    lambda draw: (json.dumps({"text": "\U0001f600"}).encode(), None),  # the same as two escapes, which are no lone ones
    lambda draw: (b'\xef\xbb\xbf{"text": "a mark of order in the middle of a file"}', "invalid JSON"),
    lambda draw: ('{"text": "sixteen bits"}'.encode("utf-16-be"), "invalid JSON"),
    lambda draw: (b'{"text": "raw \0 control"}', "invalid JSON"),
    lambda draw: (b'{"text": "escaped \\u0000 control"}', None),
    lambda draw: (json.dumps({"text": draw.choice(NO_TEXT)}).encode(), "not text"),
    lambda draw: (b'{"text": ' + draw.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999"]) + b"}", "not text"),
    lambda draw: (draw.choice(NO_FIELD), "no text field"),
    lambda draw: (b'{"text": 1, "text": "the last one counts"}', None),
    lambda draw: (b'{"text": "the last one counts", "text": 1}', "not text"),
    lambda draw: (draw.choice([b"[", b'{"a":', b"[[{"]) * draw.choice([100, 10_000, 100_000]), "invalid JSON"),
    lambda draw: (b'{"n": ' + b"[" * 50_000 + b"]" * 50_000 + b', "text": "x"}', "invalid JSON"),
    lambda draw: (b'{"n": ' + b"[" * 50 + b"]" * 50 + b', "text": "x"}', None),
    lambda draw: (b'{"n": 1' + b"0" * draw.randrange(4300, 9000) + b', "text": "x"}', "invalid JSON"),
    lambda draw: (draw.choice(EMPTY), "empty"),
    lambda draw: (json.dumps({"text": draw.choice("x\0é😀\u200b")}).encode(), None),
    lambda draw: (cut_off(draw), "invalid JSON"),
    lambda draw: (good(draw)[0] + draw.choice([b"}", b",", b" x", b"\0", good(draw)[0]]), "invalid JSON"),
    lambda draw: (b"{'text': 'Python'}", "invalid JSON"),
    lambda draw: (good(draw)[0] + b"\r", None),
]  # fmt: skip


def cut_off(draw: random.Random) -> bytes:
    line = json.dumps({"text": some_text(draw)}).encode()
    return line[: draw.randrange(1, len(line))]


def some_rows(draw: random.Random, count: int) -> list[Row]:
    return [good(draw), *(draw.choice(KINDS)(draw) for _ in range(count - 1))]  # the first one has the fields


def in_files(folder: Path, **changes: Any) -> DataSettings:
    return DataSettings(source="files", files=str(folder), **changes)


@pytest.mark.check(15)
def test_rows_of_every_wrong_kind(trials: "Trials", tmp_path: Path) -> None:
    """Each is skipped with its reason and place, plain or compressed; every other row is read, from any place on."""
    draw = trials.random
    for number in range(trials.count(small=6, full=40)):
        around = list(COMPRESSED)[number % len(COMPRESSED)]
        lines = some_rows(draw, 200)
        path = tmp_path / str(number) / f"rows.jsonl{around}"
        path.parent.mkdir()
        path.write_bytes(COMPRESSED[around](b"\n".join(line for line, _ in lines) + b"\n"))
        whole = read(in_files(path))
        for row, (line, reason) in enumerate(lines):
            with trials.one(f"{path.name}:{row + 1} {line[:40]!r}"):
                item = whole[row][0]
                assert (item.reason if isinstance(item, Skipped) else None) == reason
                assert (item.where if isinstance(item, Skipped) else item.name) == f"{path}:{row + 1}"
        with trials.one(f"{path.name} from any place on"):
            assert len(whole) == len(lines)
            for place in draw.sample(range(len(whole)), 5):
                assert read(in_files(path), cursor=json.loads(json.dumps(whole[place][1]))) == whole[place + 1 :]


@pytest.mark.check(15)
def test_values_of_every_wrong_kind_in_a_table(trials: "Trials", tmp_path: Path) -> None:
    """Each is skipped with its reason and its place, and every other value is read."""
    kinds: list[tuple[bytes | None, str | None]] = [
        (b"good", None), (None, "not text"), (b"", "empty"), (b" \n", "empty"), (b"\xff", "invalid UTF-8"),
        (b"\xed\xa0\x80", "invalid UTF-8"), ("\0é😀".encode(), None), (b"x", None),
    ]  # fmt: skip
    for number in range(trials.count(small=2, full=10)):
        values = [trials.random.choice(kinds) for _ in range(200)]
        path = tmp_path / f"{number}.parquet"
        column = pa.array([value for value, _ in values], pa.binary()).view(pa.string())
        size = trials.random.randrange(1, 90)
        parquet.write_table(pa.table({"text": column}), path, row_group_size=size, use_dictionary=number % 2 == 0)
        whole = read(in_files(path))
        for row, (value, reason) in enumerate(values):
            with trials.one(f"{path.name}:{row + 1} {value!r}"):
                item = whole[row][0]
                assert (item.reason if isinstance(item, Skipped) else None) == reason
                assert (item.where if isinstance(item, Skipped) else item.name) == f"{path}:{row + 1}"


# files that are cut off, overwritten, or grow without end


def mutated(data: bytes, draw: random.Random) -> bytes:
    at, kind = draw.randrange(len(data)), draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.randbytes(draw.randrange(1, 40)) + data[at + draw.randrange(40) :]
    if kind == 2:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + data[at // 2 :]
    return data[:at] + bytes(draw.randrange(1, 200)) + data[at:]


def make_file(folder: Path, kind: str, draw: random.Random) -> Path:
    path = folder / f"rows{kind}"
    if kind == ".parquet":
        texts = [some_text(draw) for _ in range(80)]
        parquet.write_table(pa.table({"text": texts}), path, row_group_size=20, write_page_checksum=draw.random() < 0.5)
        return path
    lines = b"".join(line + b"\n" for line, _ in some_rows(draw, 60)) if "json" in kind else b"some lines\n" * 600
    path.write_bytes(COMPRESSED[Path(kind).suffix if kind.count(".") > 1 else ""](lines))
    return path


MUTATED = (".jsonl", ".jsonl.gz", ".jsonl.bz2", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")


def survives(folder: Path, seed: int) -> None:
    """Read a mutated file, twice and from one place on: the same, and a file beside it in any case."""
    draw = random.Random(seed)
    path = make_file(folder, MUTATED[seed % len(MUTATED)], draw)
    path.write_bytes(mutated(path.read_bytes(), draw))
    (folder / "beside.txt").write_text("beside")
    try:
        whole = list(SOURCES["files"].documents(in_files(folder), 0, 0, None))
    except UserError as error:
        assert "has no field" in str(error)
        return
    assert any(isinstance(item, Document) and item.text == "beside" for item, _ in whole)
    assert list(SOURCES["files"].documents(in_files(folder), 0, 0, None)) == whole
    at = draw.randrange(len(whole))
    assert list(SOURCES["files"].documents(in_files(folder), 0, 0, whole[at][1])) == whole[at + 1 :]


def long_cells(letters: str, size: int) -> bytes:
    """Return a table of short cells, a long one of each letter, and one after them. Equal ones are in the file once."""
    written = io.BytesIO()
    cells = [*(f"short {k}" for k in range(2000)), *(letter * size for letter in letters)]
    with parquet.ParquetWriter(written, pa.schema({"text": pa.string()}), compression="zstd") as writer:
        writer.write_table(pa.table({"text": cells}))
        writer.write_table(pa.table({"text": ["after"]}))
    return written.getvalue()


AFTER = b'\n{"text": "after"}\n'
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "a table where 16 cells hold the same 30 MB": (".parquet", lambda: long_cells("x" * 16, 30 * MEGABYTE)),
    "a line of 100 MB": (".jsonl", lambda: b'{"text": "' + b"x" * 100 * MEGABYTE + b'"}' + AFTER),
    "16 MB of lists": (".jsonl", lambda: b'{"a": [' + b"[]," * (5 * MEGABYTE) + b'1], "text": "x"}' + AFTER),
    "a million brackets": (".jsonl", lambda: b"[" * 10**6 + b"\n" + b'{"a":' * 10**6 + AFTER),
    "16 MB and one wide letter": (
        ".jsonl",
        lambda: b'{"text": "' + "😀".encode() + b"x" * (16 * MEGABYTE - 40) + b'"}' + AFTER,
    ),
    "a table where 16 cells hold 30 MB each": (".parquet", lambda: long_cells("abcdefghijklmnop", 30 * MEGABYTE)),
    "a gzip bomb": (".jsonl.gz", lambda: gzip.compress(bytes(32 * MEGABYTE)) * 16 + gzip.compress(AFTER)),
    "a Zstandard bomb": (
        ".jsonl.zst",
        lambda: COMPRESSED[".zst"](bytes(64 * MEGABYTE)) * 16 + COMPRESSED[".zst"](AFTER),
    ),
    "a text of 512 MB in one line": (".txt.zst", lambda: COMPRESSED[".zst"](b"x" * 32 * MEGABYTE) * 16),
}  # fmt: skip


def swallow(folder: Path, name: str) -> str:
    """Read a bomb; return what came of it."""
    found: Counter[str] = Counter()
    for item, _ in SOURCES["files"].documents(in_files(folder), 0, 0, None):
        found["after" if isinstance(item, Document) and item.text == "after" else type(item).__name__] += 1
    if "text of" in name:
        return f"{found['Document']} documents"
    return "survived" if found["after"] == 1 else repr(found)


def victim(folder: Path, seeds: range) -> None:
    """Print `SEED survived`, or what it was, of each mutated file."""
    for seed in seeds:
        print(seed, end=" ", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            survives(folder, seed)
            print("survived", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {str(error)[:200]!r}", flush=True)


def memory() -> float:
    """Return the most memory that this program has held, in MB. What getrusage says includes the process before it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_child(*arguments: object, seconds: float) -> subprocess.CompletedProcess[str]:
    places = {"PYTHONPATH": ":".join(str(Path(__file__).parents[level]) for level in (1, 2)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, env=places, capture_output=True, text=True, timeout=seconds)


@pytest.mark.check(15)
def test_files_cut_off_or_overwritten(trials: "Trials", tmp_path: Path) -> None:
    """What can be read of them is read, every time the same; the rest counts as one skipped row, other files go on."""
    seeds = range(trials.count(small=40, full=2000))
    done = in_child("files", tmp_path / "files", len(seeds), seconds=60 + len(seeds) * 2)
    told = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    for seed in seeds:
        with trials.one(f"{MUTATED[seed % len(MUTATED)]}, seed {seed}"):
            assert told.get(str(seed)) == "survived", (told.get(str(seed)), done.returncode, done.stderr[-300:])


@pytest.mark.check(15)
def test_bombs(trials: "Trials", tmp_path: Path) -> None:
    """Rows of 100 MB, files that grow a thousandfold: under 300 MB of memory, and what comes after is read."""
    for name in BOMBS if trials.full else list(BOMBS)[:3]:
        with trials.one(name):
            ending, make = BOMBS[name]
            (tmp_path / f"bomb{ending}").write_bytes(make())
            done = in_child("bomb", tmp_path, name, seconds=120)
            (tmp_path / f"bomb{ending}").unlink()
            assert done.returncode == 0, done.stderr[-300:]
            how, growth = done.stdout.rsplit(" ", 1)
            assert how == ("32 documents" if "text of" in name else "survived")
            assert float(growth) < 300, f"{growth} MB"


# training on them


@pytest.fixture
def settings(tiny_settings: "TinySettings", tokenizer: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`settings(text, ...)` are those of a tiny run on the text, with changes to its data."""
    tokenizer.save(tmp_path / "given.model")

    def make(text: Path, **changes: Any) -> dict[str, Any]:
        return tiny_settings(
            tokenizer={"file": str(tmp_path / "given.model")},
            data={"files": str(text), "shuffle_window": 16, "validation_fraction": 0.2, **changes},
            train={"train_steps": 12, "checkpoint_steps": 100, "eval_steps": 6, "eval_tokens": 50},
        )

    return make


def write_text(path: Path, good_rows: int, bad: dict[int, bytes]) -> Path:
    """Write rows of about 60 tokens, and at some places others."""
    lines = [json.dumps({"text": f"row {k}: " + "a few words " * 8}).encode() for k in range(good_rows)]
    for place in sorted(bad):
        lines.insert(place, bad[place])
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


BAD = (b"{", b'{"text": 1}', b'{"text": "\xff"}', b'{"b": 1}', b"[1")


@pytest.mark.check(15)
@pytest.mark.usefixtures("in_process")
def test_more_bad_rows_than_allowed(
    trials: "Trials", settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is saved and stops (78) with the three most frequent reasons and their first places, and the share that
    is allowed; with a larger share it goes on, and ends as if that had been allowed from the start."""
    for number in range(trials.count(small=1, full=6)):
        with trials.one(str(number)):
            draw, folder = trials.random, tmp_path / str(number)
            folder.mkdir()
            start = draw.randrange(45, 55)  # after what held-out text is read from, and a few steps of training
            bad = {start + 2 * k: BAD[k % 5 if k < 10 else k % 3] for k in range(18)}
            text = write_text(folder / "rows.jsonl", 150, bad)
            given = settings(text, shuffle_window=8)
            given["train"] |= {"train_steps": 30, "eval_steps": None}
            allowing = {**given, "data": {**given["data"], "bad_rows": 0.5}}
            train_until(monkeypatch, folder / "whole", allowing, None)
            steps: list[Step] = []
            with pytest.raises(UserError) as caught:
                train_until(monkeypatch, folder / "run", given, None, steps)
            said = str(caught.value)
            assert "data.bad_rows allows 1.0%" in said and "rows read so far can't be used" in said
            assert said.count("(first ") == 3 and f"invalid JSON (first {text}:{start + 1}, " in said
            assert steps and newest(folder / "run").name == f"step-{steps[-1].number:08}"
            with pytest.raises(UserError) as again:
                train_until(monkeypatch, folder / "run", None, None)
            assert str(again.value) == said, "the same place, the same words"
            train_until(monkeypatch, folder / "run", None, None, changes=["data.bad_rows=0.5"])
            assert_same_run(folder / "run", folder / "whole")


@pytest.mark.check(15)
@pytest.mark.usefixtures("in_process")
def test_a_few_bad_rows(
    trials: "Trials", settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted by reason, with their first places, in metrics.jsonl: the same in a run cut three times."""
    for number in range(trials.count(small=1, full=6)):
        with trials.one(str(number)):
            folder = tmp_path / str(number)
            folder.mkdir()
            places = trials.random.sample(range(1, 20), 9)
            bad = dict(zip(places, [*BAD, b"", b"", b'{"text": " "}', b"{}"], strict=True))
            text = write_text(folder / "rows.jsonl", 20, bad)
            train_until(monkeypatch, folder / "whole", settings(text), None)
            for part, step in enumerate([*sorted(trials.random.sample(range(1, 12), 3)), None]):
                train_until(monkeypatch, folder / "cut", None if part else settings(text), step)
            assert_same_run(folder / "cut", folder / "whole")
            last = rows(folder / "whole")[-1]
            once = {"invalid JSON": 2, "not text": 1, "invalid UTF-8": 1, "no text field": 2, "empty": 3}
            passes = last["documents"] / 20
            assert passes > 1 and last["skipped"].keys() == once.keys()
            assert all(
                n * math.floor(passes) <= last["skipped"][why] <= n * math.ceil(passes) for why, n in once.items()
            )
            lines = text.read_bytes().split(b"\n")
            for reason, found in last["skipped_first"].items():
                assert len(found) == min(3, once[reason])
                assert all(lines[int(place.rpartition(":")[2]) - 1] in bad.values() for place in found)


SMALL: dict[str, tuple[bytes, str | None]] = {  # a text, and what is said of it: None, it is trained on
    "no row": (b"", "holds no text"),
    "empty lines": (b"\n \n\n", "holds no text (empty: 3)"),
    "nothing but bad rows": (b"{\n" * 8, "holds no text (invalid JSON: 8)"),
    "a thousand bad rows": (b"{\n" * 1000, "1,000 of 1,000 rows read so far can't be used (100.0%)"),
    "one row": (b'{"text": "one row alone"}\n', "split holds no text"),
    "less than a batch": (b"".join(b'{"text": "%d"}\n' % k for k in range(40)), None),
    "one letter a row": (b"".join(b'{"text": "%c"}\n' % (97 + k % 26) for k in range(99)), None),
    "one letter a row, in files of 64 KB of spaces": (
        b"".join(b'{"text": "%c"}' % (97 + k % 26) + b" " * 4096 + b"\n" for k in range(99)),
        None,
    ),
}


@pytest.mark.check(15)
@pytest.mark.usefixtures("in_process")
def test_hardly_any_text(
    trials: "Trials", settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little to train on is said at once, and what it held instead; less than a batch is read again and again."""
    for name, (content, message) in SMALL.items():
        for packing in (True, False) if trials.full else (True,):
            with trials.one(f"{name}, {packing}"):
                folder = tmp_path / f"{name} {packing}"
                folder.mkdir()
                (folder / "rows.jsonl").write_bytes(content)
                began = time.monotonic()
                given = settings(folder / "rows.jsonl", packing=packing)
                if message is None:
                    train_until(monkeypatch, folder / "run", given, None)
                    assert rows(folder / "run")[-1]["step"] == 12
                else:
                    with pytest.raises(UserError) as caught:
                        train_until(monkeypatch, folder / "run", given, None)
                    assert message in str(caught.value)
                assert time.monotonic() - began < 20


if __name__ == "__main__":
    if sys.argv[1] == "files":
        victim(Path(sys.argv[2]), range(int(sys.argv[3])))
    else:
        (Path(sys.argv[2]) / "warm.txt").write_text("warm")
        list(SOURCES["files"].documents(in_files(Path(sys.argv[2]) / "warm.txt"), 0, 0, None))
        (Path(sys.argv[2]) / "warm.txt").unlink()
        before = memory()
        print(swallow(Path(sys.argv[2]), sys.argv[3]), f"{memory() - before:.0f}")
