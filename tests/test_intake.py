"""What a stranger's folder and file may be: contained, regular, bounded; and JSON, tensors and tokenizers likewise."""

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from moelet.errors import UserError
from moelet.storage import intake
from moelet.storage.intake import DEEPEST, lines_inside, open_file, open_inside, parse_json, refuse_links
from moelet.storage.tensor_file import LARGEST_HEADER, TensorFile
from moelet.text.tokenizer_file import check_model
from moelet.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, one in a folder of its own, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a").write_text("a")
    (tmp_path / "in" / "sub" / "b").write_text("b")
    return tmp_path / "in"


def content(folder: Path, name: Any) -> str:
    with open_inside(folder, name, 100) as file:
        return file.read().decode()


def test_what_lies_in_a_folder_is_opened(folder: Path) -> None:
    assert (content(folder, "a"), content(folder, "sub/b")) == ("a", "b")
    folder.with_name("link").symlink_to(folder)
    assert content(folder.with_name("link"), "a") == "a"  # a person named the link
    with pytest.raises(FileNotFoundError):
        content(folder, "sub/c")


NO_NAMES = (
    "",
    ".",
    "..",
    "../secret",
    "/etc/passwd",
    "sub/../../secret",
    "a/",
    "./a",
    "a\0",
    "sub//b",
    "\ud800",
    5,
    None,
)


@pytest.mark.parametrize("name", [*NO_NAMES, ["a"]])
def test_names_that_lead_elsewhere(folder: Path, name: Any) -> None:
    with pytest.raises(UserError, match="A folder's files lie in it"):
        content(folder, name)


def test_no_random_name_leads_out(folder: Path) -> None:
    """Whatever is opened lies, with all links followed, in the folder."""
    (folder / "out").symlink_to("../secret")
    (folder / "sub" / "up").symlink_to("..")
    (folder / "round").symlink_to("sub")
    chance, opened = random.Random(0), 0
    parts = ["a", "b", "sub", "out", "up", "round", "..", ".", "", "secret", "in", "/", str(folder.parent)]
    for _ in range(3000):
        name = "/".join(chance.choices(parts, k=chance.randrange(1, 6)))
        try:
            text = content(folder, name)
        except (UserError, OSError):
            continue
        opened += 1
        real = (folder / name).resolve()
        assert real.is_relative_to(folder.resolve()) and text == real.read_text() != "secret"
    assert opened > 30


def test_links_and_what_is_no_file(folder: Path) -> None:
    (folder / "link").symlink_to("a")
    (folder / "far").symlink_to(folder.parent)
    os.mkfifo(folder / "pipe")
    (folder / "null").symlink_to("/dev/null")
    for name, words in (("link", "link is a link"), ("far/secret", "far is a link"), ("null", "is a link"),
                        ("pipe", "is a pipe"), ("sub", "is a folder")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            content(folder, name)
    for path, words in ((folder / "pipe", "is a pipe"), (folder, "is a folder"), (Path("/dev/zero"), "is a device")):
        with pytest.raises(UserError, match=words):
            open_file(path, 100)
    with open_file(folder / "link", 100) as file:  # a person named it
        assert file.read() == b"a"
    with pytest.raises(UserError, match="far is a link"):
        refuse_links(folder)


@pytest.mark.parametrize("place", ["sub", "sub/b"])
def test_a_link_put_in_place_of_a_file_or_folder_while_it_is_opened(
    place: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change comes at the worst moment: after the look, before the opening."""
    look, secret = intake._refuse_link, folder.parent / "elsewhere"
    secret.mkdir()
    (secret / "b").write_text("secret")

    def look_and_change(at: int, part: str, path: Path) -> None:
        look(at, part, path)
        if part == place.rpartition("/")[2]:
            os.rename(folder / place, folder / "aside")
            os.symlink(secret if place == "sub" else secret / "b", folder / place)

    monkeypatch.setattr(intake, "_refuse_link", look_and_change)
    with pytest.raises((UserError, OSError)):
        content(folder, "sub/b")


def test_sizes_are_bounded_before_reading(folder: Path) -> None:
    with (folder / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="has 1099511627776 bytes. It has at most 100"):
        content(folder, "sparse")


def test_lines(folder: Path) -> None:
    (folder / "lines").write_bytes(b"one\r\ntwo\n\xff\xfe\ncut")
    assert list(lines_inside(folder, "lines")) == ["one", "two", "\ufffd\ufffd", "cut"]
    assert list(lines_inside(folder, "none")) == []


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_json_is_json() -> None:
    value = {"a": [1, 2.5, None, True, "[" * 500 + '\\"' + "{" * 500], "b": {"c": [[]] * 200}}
    assert parse_json(json.dumps(value), "it") == value
    assert parse_json(nested(DEEPEST), "it")
    for text, words in (
        (nested(DEEPEST + 1), "nests deeper than 64"),
        ("[" * 10**6, "nests deeper"),
        ('"' + '\\"' * 10**6 + "[" * 100, "is not valid JSON"),  # in linear time
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice"),
        ("{", "is not valid JSON"),
        ("1" * 5000, "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
    ):
        started = time.process_time()
        with pytest.raises(UserError, match=words):
            parse_json(text, "it")
        assert time.process_time() - started < 1


TENSORS = {
    "a": torch.randn(3, 4), "b": torch.randn(2).bfloat16(), "c": torch.tensor(1.5), "d": torch.zeros(0, 3),
    "e": torch.arange(5), "f": torch.tensor([True, False]), "g": torch.randn(2, 2).half(),
}  # fmt: skip


def read(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    path.write_bytes(data)
    with open_file(path, 2**40) as file:
        return TensorFile(file, "it").read_all()


def packed(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_tensors_are_those_of_the_library_or_refused(tmp_path: Path) -> None:
    """Over mutations, what is read here the library reads too, to the same bits; what it refuses is refused here."""
    whole = safetensors.torch.save(TENSORS, {"format": "pt"})
    chance, read_by_both, refused = random.Random(0), 0, 0
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(chance.randrange(3)):
            kind, at = chance.randrange(4), chance.randrange(min(len(data), 700))
            if kind == 0:
                data[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                data[at : at + 1] = bytes([chance.choice(b'0123456789,:{}[]"')])
            elif kind == 2:
                data[at:at] = data[at : at + chance.randrange(1, 40)]
            else:
                data = data[: at + 1]
        try:
            found = read(tmp_path / "file", bytes(data))
        except UserError:
            refused += 1
            continue
        theirs = safetensors.torch.load(bytes(data))
        read_by_both += 1
        assert found.keys() == theirs.keys()
        for name, tensor in found.items():
            assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
            assert tensor.flatten().view(torch.uint8).equal(theirs[name].contiguous().flatten().view(torch.uint8))
    assert read_by_both > 300 and refused > 300


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "its header would have"),
        ((2**63).to_bytes(8, "little"), "its header would have"),
        (packed(b" " * (LARGEST_HEADER + 1)), "its header would have"),
        (packed([]), "no JSON object"),
        (packed({"a": 5}), "something else than dtype"),
        (packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}, b"1234"), "something else"),
        (packed({"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "not one of"),
        (packed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "has the shape"),
        (packed({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"), "has the shape"),
        (packed({"a": {"dtype": "F32", "shape": [float("nan")], "data_offsets": [0, 4]}}, b"1234"), "has the shape"),
        (packed({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"), "has the shape"),
        (packed({"a": {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}}), "has the shape"),
        (packed({"a": {"dtype": "F32", "shape": [1] * 99, "data_offsets": [0, 4]}}, b"1234"), "has the shape"),
        (packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "not what its shape"),
        (packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"), "leave a gap"),
        (packed({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"1234"), "overlap"),
        (packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"), "the file at"),
        (packed({"a\n": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"), "names a tensor"),
        (packed(b'{"a": 1, "a": 2}'), "twice"),
    ],
)  # fmt: skip
def test_a_tensor_file_that_is_none(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read(tmp_path / "file", data)


def test_a_header_of_five_million_tensors_costs_nothing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        entries = b"".join(b'"%d":{},' % k for k in range(100_000)) * 50
        file.write(packed(b"{" + entries + b'"a":{}}'))
    started = time.process_time()
    with pytest.raises(UserError, match="its header would have"), open_file(tmp_path / "file", 2**40) as file:
        TensorFile(file, "it")
    assert time.process_time() - started < 0.5


def test_a_tokenizer_that_is_none(tokenizer: Tokenizer) -> None:
    whole = tokenizer.model_bytes
    check_model(whole)
    piece = b"\n\x0a\n\x01z\x15\0\0\0\0\x18"
    for data, words in (
        (b"", "no pieces"),
        (whole[:-1], "damaged, or cut off"),
        (whole + b"\x1a\x04\x12\x02ab", "field 3 too many"),
        (piece + b"\x01\x1a\x04\x12\x02ab", "by a map"),
        (piece + b"\x01\x2a\x04\x12\x02ab", "by a map"),
        (piece + b"\x01" + piece + b"\x01", "b'z' twice"),
        (piece + b"\x09", "of kind 9"),
        (b"\n\x0a\n\x01z\x15\0\0\xc0\x7f\x18\x01", "no finite score"),
        (b"\n\x0a\n\x01\xff\x15\0\0\0\0\x18\x01", "not valid Unicode"),
        (b"\n\x02\n\x00", "a piece has 0 bytes"),
        (b"\x32\x01a", "a field 6 too many"),
        (b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "damaged"),
        (b"\x0b", "of type 3"),
    ):
        with pytest.raises(UserError, match=words):
            check_model(data)
