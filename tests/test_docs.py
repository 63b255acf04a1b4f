"""What the documents tell people to type exists, and so does what they link to."""

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from moelet.cli import app
from moelet.hparams import Hparams

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NOTES = {"experiments.md", "CHANGELOG.md"}  # what was typed then, not what is to be typed
BEFORE = r"(?:!|while |cd \S+ && |pip \S.*? && |timeout (?:-\S+ \S+ )*\S+ |[A-Z_]+=\S+ )*"
COMMAND = re.compile(rf"^{BEFORE}(python -m moelet|python train\.py|moelet)(?: (.*))?$")


def commands(text: str) -> Iterator[tuple[list[str], bool]]:
    """Yield the arguments of each moelet command, and whether it is to be typed: in a block, not in a sentence."""
    joined = text.replace("\\\n", " ")
    block = r"^```\w*\n(.*?)^```"
    blocks = re.findall(block, joined, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(block, "", joined, flags=re.MULTILINE | re.DOTALL))
    for typed, lines in ((True, "".join(blocks).splitlines()), (False, inline)):
        for match in filter(None, map(COMMAND.match, lines)):
            lexer = shlex.shlex((match[2] or "").replace("\\|", "|"), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(itertools.takewhile(lambda word: not set(word) <= set(";|&<>()"), lexer))
            yield ["train", *words] if "train.py" in match[1] else words, typed


def parse(words: list[str], typed: bool) -> dict[str, Any]:
    """Return the options that the command line would hand over. Raises click's exceptions."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("moelet", list(words), resilient_parsing=True)
    while hasattr(group, "commands"):
        name, group, words = group.resolve_command(context, list(words))
        try:
            context = group.make_context(name, list(words), resilient_parsing=hasattr(group, "commands"))
        except Exception as error:
            if type(error).__name__ == "MissingParameter" and not typed:  # a sentence may name the verb alone
                return {}
            raise
        words = list(words)
    return context.params


CASES = [(path, *found) for path in DOCUMENTS if path.name not in NOTES for found in commands(path.read_text("utf-8"))]
OWN_TEXT = ["train", "recipes/own-text.json", "--run", "runs/mine", "--set", "data.files=my-text"]


def test_commands_are_found() -> None:
    assert len(CASES) > 80 and sum(typed for _, _, typed in CASES) > 40
    assert OWN_TEXT in [words for _, words, _ in CASES]


@pytest.mark.parametrize(
    ("path", "words", "typed"), CASES, ids=[f"{path.name}-{' '.join(words) or 'itself'}" for path, words, _ in CASES]
)
def test_a_command_can_be_typed(path: Path, words: list[str], typed: bool) -> None:
    if not words or any(word.startswith("[") or word == "..." for word in words):
        pytest.skip("a synopsis")
    params = parse(words, typed)
    for change in params.get("changes") or []:
        section, _, rest = change.partition(".")
        key = rest.partition("=")[0]
        assert section in Hparams.model_fields, change
        assert key in Hparams.model_fields[section].annotation.model_fields, change  # type: ignore[union-attr]
    file = params.get("file")
    if file is not None and str(file).startswith(("recipes/", "hparams.json")):
        assert (ROOT / file).is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_index_lists_every_document() -> None:
    listed = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text("utf-8")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"} <= listed
