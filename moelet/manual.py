"""What each setting does: told by `moelet settings`, and written as docs/settings.md.

All of it is read from where it is decided: descriptions, ranges and defaults from `moelet.sections`, names from the
tables they are looked up in, who reads a setting from the code. To write the page anew, from the repository's root:

    python -m moelet.manual
"""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from moelet.errors import UserError, nearest
from moelet.hparams import Hparams, read_hparams
from moelet.sections import MixedSource
from moelet.storage.disk import write_file
from moelet.train import NAMED

PAGE = Path("docs/settings.md")
FILES = ("hparams.json", "recipes/*.json")  # whose values the page compares
BOUNDS = {"ge": ">= ", "gt": "> ", "le": "<= ", "lt": "< "}  # annotated_types' names
KINDS = {int: "whole number", float: "number", str: "text", bool: "true, false", NoneType: "null"}
READERS = {  # modules in which a section's settings are looked for, by the names they go by there
    "model": ("moe", "modelling", "experts", "attention", "decoding"),
    "tokenizer": ("train", "commands/tokenizer", "prepare"),
    "data": ("text/sources", "text/files", "text/hub", "text/shards", "data", "train"),
    "optim": ("optim", "muon", "state", "step"),
    "balance": ("step", "loss"),
    "parallel": ("parallel/layout",),
    "train": ("state", "step", "session", "storage/saving", "trackers", "hparams", "fit", "identity", "cli", "train"),
}
HOLDERS = {"settings", "s", "data", "part"}  # what code calls a section, besides by its name
OTHER_NAME = {"mix": "parts"}  # read through a property
INTRODUCTIONS = {
    "model": "The shape of the network. The defaults are the reference architecture.",
    "tokenizer": "How text becomes pieces; what a tokenizer is trained on is the run's own training text.",
    "data": "Where text comes from, and how it becomes rows ([data.md](data.md)).",
    "optim": "How weights move.",
    "balance": "What keeps all experts in use.",
    "parallel": "How ranks that torchrun starts divide a run ([parallel.md](parallel.md)); unread alone.",
    "train": "How long, how much at a time, and what is kept of it.",
}


class Setting(NamedTuple):
    """What there is to say of one."""

    name: str
    default: str
    allowed: str
    meaning: str
    readers: list[str]  # modules; what only commands read has none here


def settings() -> list[Setting]:
    """Return all settings, in the order of the file."""
    return [
        Setting(
            f"{section}.{key}",
            json.dumps(field.default),
            _allowed(section, key, field),
            str(field.description),
            readers(section, key),
        )
        for section, of_section in Hparams.model_fields.items()
        for key, field in of_section.annotation.model_fields.items()  # type: ignore[union-attr]
    ]


def _allowed(section: str, key: str, field: FieldInfo) -> str:
    names = [] if (section, key) not in NAMED else [*NAMED[section, key]]
    if (names and field.default is None) or (section, key) == ("balance", "loss"):
        names.append("null")
    return ", ".join(names) or _kind(field.annotation, field.metadata)


def _kind(annotation: Any, metadata: list[Any]) -> str:
    """Return a type in words: `whole number >= 1, or null`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if origin in (Union, UnionType):
        parts = [_kind(part, metadata if part is not NoneType else []) for part in get_args(annotation)]
        return ", or ".join(dict.fromkeys(parts))
    if hasattr(annotation, "__metadata__"):  # Annotated
        return _kind(annotation.__origin__, [m for field in annotation.__metadata__ for m in field.metadata])
    if origin is tuple:
        return f"{len(get_args(annotation))} numbers"
    if origin is list:
        return "list of sources" if get_args(annotation) == (MixedSource,) else "list of texts"
    if annotation not in (int, float):
        return KINDS[annotation]
    bounds = [f"{sign}{_bound(getattr(m, end))}" for m in metadata for end, sign in BOUNDS.items() if hasattr(m, end)]
    return f"{KINDS[annotation]} {' and '.join(bounds)}".strip()


def _bound(value: float) -> str:
    return "2^63 - 1" if value == 2**63 - 1 else f"{value:g}" if value < 1e6 else f"{value}"


def readers(section: str, key: str) -> list[str]:
    """Return the modules of READERS that read a setting."""
    return [name for name in READERS[section] if OTHER_NAME.get(key, key) in _read_in(name, section)]


def _read_in(module: str, section: str) -> set[str]:
    """Return the attributes that a module takes from what it calls a section."""
    tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name in HOLDERS or name == section:
                found.add(node.attr)
    return found


def tell(name: str | None) -> list[str]:
    """Return lines about a setting, about those of a section, or about all. Raises UserError for what is neither."""
    known = settings()
    chosen = [s for s in known if name is None or s.name == name or s.name.partition(".")[0] == name]
    chosen = chosen or [s for s in known if s.name.partition(".")[2] == name]
    if not chosen:
        names = [*Hparams.model_fields, *(s.name for s in known), *(s.name.partition(".")[2] for s in known)]
        raise UserError(
            f"there is no setting {name!r}. It must be a section, such as model, or a setting, such as model.top_k."
            f"{nearest(str(name), names)} All of them: moelet settings"
        )
    told = [(f"{s.name} = {s.default}", f"    {s.meaning}", f"    may be: {s.allowed}") for s in chosen]
    return [line for lines in told for line in lines]


def page(files: Mapping[str, Hparams]) -> str:
    """Return docs/settings.md, with what `files` set otherwise than the defaults."""
    lines = [
        "# What each setting does",
        "",
        "<!-- Written by `python -m moelet.manual` from moelet/sections.py: change it there. -->",
        "",
        "A settings file has one object a section; what is left out has its default, and `--set section.key=value`",
        "changes one for a run: `python train.py hparams.json --set optim.lr=0.001`. `null` means off, or what the",
        "table says. A run's folder holds all of them. In a terminal: `python -m moelet settings optim.lr`.",
    ]
    every = settings()
    for section, introduction in INTRODUCTIONS.items():
        lines += ["", f"## {section}", "", introduction, ""]
        lines += ["| setting | default | may be | what it does | read in |", "|---|---|---|---|---|"]
        for s in (s for s in every if s.name.startswith(f"{section}.")):
            where = f"`{s.readers[0]}.py`" if s.readers else ""  # all of them would change with any change of code
            lines.append(f"| `{s.name}` | `{s.default}` | {s.allowed} | {s.meaning} | {where} |".replace("<", "&lt;"))
    weight = MixedSource.model_fields["weight"]
    lines += [
        "",
        "A source of `data.mix` has the settings of `data` up to `text_field`, which say where text comes from,",
    ]
    lines += [f"and `weight` ({weight.default:g}): {weight.description}."]
    return "\n".join([*lines, *_comparison(files), ""])


def _comparison(files: Mapping[str, Hparams]) -> list[str]:
    """Return a table of the settings that some file sets otherwise than the default."""
    values = {
        f"{section}.{key}": [json.dumps(value[key]) for value in of_files]
        for section in Hparams.model_fields
        if (of_files := [file.model_dump(mode="json")[section] for file in files.values()])
        for key in of_files[0]
    }
    names = [Path(path).stem for path in files]
    lines = ["", "## What the settings files here change", "", "What is at its default in all of them is left out.", ""]
    lines += [f"| setting | default | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for s in settings():
        if any(value != s.default for value in values.get(s.name, [])):
            cells = ["" if value == s.default else f"`{value}`" for value in values[s.name]]
            lines.append(f"| `{s.name}` | `{s.default}` | {' | '.join(cells)} |")
    return lines


def written(root: Path) -> str:
    """Return the page with the settings files of a repository."""
    return page({path.name: read_hparams(path) for pattern in FILES for path in sorted(root.glob(pattern))})


if __name__ == "__main__":
    write_file(PAGE, written(Path()).encode())
    print(f"see   {PAGE}")
