"""The settings of a run: frozen, strict, one JSON file in and out.

One file rebuilds the run. What each setting may be is `moelet.sections`'; here is the file, and what is said of a wrong
one. Whether it fits the data or the machine is checked by whoever uses it.
"""

import json
import math
from collections.abc import Callable, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from moelet.errors import UserError, nearest
from moelet.sections import (
    LENGTHS,
    MOST_SEQUENCES,
    BalanceSettings,
    DataSettings,
    MixedSource,
    ModelSettings,
    OptimSettings,
    ParallelSettings,
    Section,
    TokenizerSettings,
    TrainSettings,
)
from moelet.storage.intake import LARGEST_JSON, open_file, open_inside, parse_json

UNION_BRANCHES = ("list[", "str", "constrained", "literal[")  # how pydantic names the parts of `int | str` in a place
LONGEST_VALUE = 60  # characters of a wrong value that its message shows
MOST_PROBLEMS = 50  # wrong settings that are explained
ENOUGH = 'Give the path of one. {"train": {"train_steps": 1000}} in a file is enough for a beginning.'
DEFAULT_FILE, DEFAULT_STEPS = Path("hparams.json"), 1000  # where no file is given; where there is none


class Hparams(Section):
    """All settings of a run, as `hparams.json` holds them."""

    model: ModelSettings = Field(default_factory=ModelSettings)
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    balance: BalanceSettings = Field(default_factory=BalanceSettings)
    parallel: ParallelSettings = Field(default_factory=ParallelSettings)
    train: TrainSettings

    @model_validator(mode="after")
    def _bias_is_moved(self) -> Self:
        if self.model.selection_bias != (self.balance.bias_rate is not None):
            raise ValueError(
                f"model.selection_bias is {json.dumps(self.model.selection_bias)} and balance.bias_rate is "
                f"{json.dumps(self.balance.bias_rate)}. The one moves the other. Set both, such as true and 0.001, or "
                "false and null."
            )
        return self

    @property
    def batch_size(self) -> int:
        """Sequences a micro-step, once they are known: `moelet.fit` finds "auto" before a run is built."""
        assert self.train.batch_size != "auto"
        return self.train.batch_size

    @property
    def micro_batches(self) -> list[int]:
        """Sequences of each micro-step of an optimizer step."""
        if self.train.global_batch_size is None:
            return [self.batch_size] * self.train.gradient_accumulation
        whole, rest = divmod(self.train.global_batch_size, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest else [])

    @property
    def tokens_per_step(self) -> int:
        """Positions of one optimizer step, padding included."""
        return (self.train.global_batch_size or sum(self.micro_batches)) * self.model.max_length

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the run; None where a time budget decides that on the way."""
        if self.train.train_tokens is not None:
            return math.ceil(self.train.train_tokens / self.tokens_per_step)
        return self.train.train_steps

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2) + "\n"


def read_hparams(path: str | Path, changes: Sequence[str] = ()) -> Hparams:
    """Return the settings in the JSON file at `path` with `changes` ("section.key=value") made to them.

    Raises UserError naming every wrong setting: what it is, what is allowed, what to do.
    """
    return _read(lambda: open_file(Path(path), LARGEST_JSON), path, changes)


def read_or_default(file: Path | None, changes: Sequence[str] = ()) -> Hparams:
    """Return the settings of a file; without one, those of hparams.json, or the defaults where there is none."""
    if file is not None or DEFAULT_FILE.exists():
        return read_hparams(file or DEFAULT_FILE, changes)
    data: dict[str, Any] = {"train": {"train_steps": DEFAULT_STEPS}}
    for change in changes:
        _apply(data, change)
    return make_hparams(data)


def read_hparams_inside(folder: Path, name: str, changes: Sequence[str] = ()) -> Hparams:
    """Return the settings of a folder, as `read_hparams`, from a file that lies in it."""
    return _read(lambda: open_inside(folder, name, LARGEST_JSON), folder / name, changes)


def _read(opened: Callable[[], BufferedReader], path: str | Path, changes: Sequence[str]) -> Hparams:
    try:
        with opened() as file:
            data = parse_json(file.read(), str(path))
    except FileNotFoundError:
        raise UserError(f"there is no settings file {path}. {ENOUGH}") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}). Give the path of a settings file.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}. A settings file holds one JSON object of sections.")
    for change in changes:
        _apply(data, change)
    return make_hparams(data, str(path))


def make_hparams(data: dict[str, Any], origin: str = "the settings") -> Hparams:
    """Return checked settings from plain data; raise UserError naming `origin` and every wrong setting."""
    try:
        return Hparams.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = list(dict.fromkeys(f"  {_explain(problem)}" for problem in problems[:MOST_PROBLEMS]))
        lines += [f"  and {more} more"] if (more := len(problems) - MOST_PROBLEMS) > 0 else []
        count = f"{len(lines)} settings don't" if len(lines) > 1 else "a setting doesn't"
        raise UserError("\n".join([f"{origin}: {count} fit.", *lines])) from None


def with_text(hparams: Hparams, text: str, text_field: str | None, origin: str) -> Hparams:
    """Return the settings with other text: `embedded`, or a path, glob or folder. Raises UserError as make_hparams."""
    changed = hparams.model_dump(mode="json")
    changed["data"] |= {"source": "embedded"} if text == "embedded" else {"source": "files", "files": text}
    changed["data"] |= {"text_field": text_field or hparams.data.text_field}
    return make_hparams(changed, origin)


def _apply(data: dict[str, Any], change: str) -> None:
    """Make one `section.key=value` change in place; the value is JSON, else a string."""
    name, equals, text = change.partition("=")
    section, dot, key = name.partition(".")
    if not (equals and dot and key and section):
        raise UserError(f"--set {change!r} has no section, key and value. Write --set section.key=value.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    settings = data.setdefault(section, {})
    if not isinstance(settings, dict):
        raise UserError(f"section '{section}' is {settings!r}. It must be an object of settings.")
    settings[key] = value
    if section == "train" and key in LENGTHS and value is not None:
        settings |= {other: None for other in LENGTHS if other != key}


def _explain(problem: Any) -> str:
    """Return one line for a pydantic error: the setting, what was given, what is needed."""
    location = [str(part) for part in problem["loc"]]
    setting = ".".join(part for part in location if not part.startswith(UNION_BRANCHES))
    if problem["type"] == "extra_forbidden":
        known = list(_owner(location).model_fields)
        hint = nearest(location[-1], known) or f" Known here: {', '.join(known)}."
        return f"{setting}: there is no such setting.{hint}"
    if problem["type"] == "value_error":
        return f"{setting}: {problem['ctx']['error']}" if setting else str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        example = ' Such as "train": {"train_steps": 300}.' if setting == "train" else ""
        return f"{setting}: it is missing. Add it.{example}"
    if problem["type"] == "json_invalid":  # what json.dumps writes and a strict reader refuses: lone surrogates, depth
        return f"{problem['msg'].partition(' at line')[0]}. Mend the value that holds it."
    need = problem["msg"].removeprefix("Input should be ")
    if setting == "data.files":
        need = "a string or a list of strings (on the command line: '[\"2024\"]')"
    if setting == "train.batch_size":
        need = f'an integer from 1 to {MOST_SEQUENCES}, or "auto"'
    if setting == "parallel.data":
        need = 'an integer of at least 1, or "auto"'
    given = json.dumps(problem["input"])
    given = given if len(given) <= LONGEST_VALUE else f"{given[:LONGEST_VALUE]}..."
    return f"{setting} is {given}. It must be {need}. Change it{_or_default(location)}."


def _owner(location: list[str]) -> Any:
    """Return the section that the last name of `location` belongs to."""
    if "mix" in location[:-1]:
        return MixedSource
    return Hparams.model_fields[location[0]].annotation if len(location) > 1 else Hparams


def _or_default(location: list[str]) -> str:
    """Return ", or leave it out for the default, 2. It means: experts that each token uses" for what has a default."""
    if len(location) < 2:
        return ""
    name = location[3] if "mix" in location[:-1] else location[1]  # ["data", "mix", "0", "weight"]
    field = _owner(location).model_fields[name]
    return f", or leave it out for the default, {json.dumps(field.default)}. It means: {field.description}"
