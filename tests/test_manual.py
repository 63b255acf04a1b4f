"""docs/settings.md is what the code says, and says something of every setting."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moelet import manual
from moelet.cli import main
from moelet.errors import UserError
from moelet.hparams import Hparams, make_hparams, read_hparams

ROOT = Path(__file__).parent.parent
SETTINGS = {setting.name: setting for setting in manual.settings()}


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / manual.PAGE).read_text(encoding="utf-8") == manual.written(ROOT), "run python -m moelet.manual"


def test_every_section_has_its_words() -> None:
    assert list(manual.INTRODUCTIONS) == list(Hparams.model_fields) == list(manual.READERS)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_meaning_and_a_reader(name: str) -> None:
    setting = SETTINGS[name]
    assert setting.meaning not in ("", "None") and setting.allowed and setting.readers
    assert f"| `{name}` | `{setting.default}` |" in (ROOT / manual.PAGE).read_text(encoding="utf-8")


def fits(name: str, value: Any) -> bool:
    section, _, key = name.partition(".")
    try:
        make_hparams({"train": {}} | {section: {key: value}})
    except UserError as error:
        return f"{name} is {json.dumps(value)}. It must be" not in str(error)  # others may not fit with it
    return True


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_said_to_be_allowed_is(name: str) -> None:
    allowed = SETTINGS[name].allowed
    assert fits(name, None) == ("null" in allowed)
    for sign, bound in re.findall(r"(>=|>|<=|<) (2\^63 - 1|[\d.]+)", allowed):
        limit = 2**63 - 1 if "^" in bound else float(bound) if "." in bound else int(bound)
        assert fits(name, limit) == ("=" in sign)
        assert not fits(name, limit + (1 if "<" in sign else -1))
    if allowed == "true, false":
        assert fits(name, True) and fits(name, False) and not fits(name, 1)
    elif re.fullmatch(r"[a-z0-9_]+(, [a-z0-9_]+)+", allowed):
        assert all(fits(name, word) for word in allowed.split(", ") if word != "null")


def test_the_files_of_the_repository_are_compared() -> None:
    page = manual.written(ROOT).partition("## What the settings files")[2]
    recipe = read_hparams(ROOT / "recipes" / "modern-cpu.json").model_dump(mode="json")
    [header] = [line for line in page.splitlines() if line.startswith("| setting")]
    column = header.split(" | ").index("modern-cpu")
    cells = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("| `"): row for row in cells}
    for name, setting in SETTINGS.items():
        section, _, key = name.partition(".")
        value = json.dumps(recipe[section][key])
        expected = "" if value == setting.default else f"`{value}`"
        assert (rows[name][column] if name in rows else "") == expected


def test_settings_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings", "top_k"]) == 0
    said = capsys.readouterr().out
    assert said == "model.top_k = 2\n    experts that each token uses\n    may be: whole number >= 1\n"
    assert main(["settings", "balance"]) == 0
    assert capsys.readouterr().out.count("may be:") == len(Hparams.model_fields["balance"].annotation.model_fields)  # type: ignore
    assert main(["settings"]) == 0
    assert capsys.readouterr().out.count("may be:") == len(SETTINGS)
    assert main(["settings", "optim.lrr"]) == 78
    assert "Did you mean 'optim.lr'?" in capsys.readouterr().err


def test_a_wrong_value_is_told_what_it_means() -> None:
    with pytest.raises(UserError, match=r"model.top_k is 0\. .*default, 2\. It means: experts that each token uses\."):
        make_hparams({"model": {"top_k": 0}, "train": {"train_steps": 1}})
