"""Settings: the reference architecture by default, strict, frozen, and every mistake explained."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError

from moelet.errors import UserError
from moelet.hparams import Hparams, make_hparams, read_hparams

ROOT = Path(__file__).parent.parent
LENGTH = {"train": {"train_steps": 3}}


def write(folder: Path, text: str | dict[str, Any]) -> Path:
    path = folder / "settings.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return path


def merged(**sections: Any) -> dict[str, Any]:
    return {**LENGTH, **sections}


def message(data: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_hparams(data)
    return str(caught.value)


def fields() -> list[tuple[str, str, Any]]:
    sections = Hparams.model_fields.items()
    return [(s, k, f) for s, section in sections for k, f in section.annotation.model_fields.items()]  # type: ignore


def test_the_defaults_are_the_reference_architecture() -> None:
    model = make_hparams(LENGTH).model
    reference = {
        "vocab_size": None,
        "max_length": 512,
        "d_model": 512,
        "d_embed": 128,
        "embed_scale": 1.0,
        "n_layers": 4,
        "n_heads": 8,
        "d_ff": 2048,
        "n_experts": 8,
        "top_k": 2,
        "router": "softmax",
        "normalize_top_k": False,
        "activation": "silu",
        "tie_embeddings": True,
        "attention": "auto",
    }
    assert {key: getattr(model, key) for key in reference} == reference
    assert (model.head_width, model.expert_width) == (64, 256)
    hparams = make_hparams(LENGTH)
    assert model.dropout > 0 and hparams.balance.loss == "switch" and hparams.balance.alpha > 0


def test_the_complete_json_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    given = merged(optim={"betas": [0.8, 0.99], "lr": 0.1 + 0.2}, data={"source": "files", "files": ["a", "b"]})
    hparams = make_hparams(given)
    again = read_hparams(write(tmp_path, hparams.to_json()))
    assert again == hparams
    assert again.to_json() == hparams.to_json()
    assert set(json.loads(hparams.to_json())) == set(Hparams.model_fields)
    assert len(json.loads(hparams.to_json())["model"]) == len(type(hparams.model).model_fields)


def test_root_hparams_is_the_reference_architecture() -> None:
    model = read_hparams(ROOT / "hparams.json").model
    assert model.model_copy(update={"embed_scale": 1.0}) == make_hparams(LENGTH).model


@pytest.mark.parametrize(
    "path", sorted([ROOT / "hparams.json", *(ROOT / "recipes").glob("*.json")]), ids=lambda p: p.name
)
def test_every_settings_file_in_the_repository_reads(path: Path) -> None:
    hparams = read_hparams(path)
    assert (hparams.total_steps or hparams.train.time_budget or 0) >= 1


def test_root_hparams_names_every_setting_in_order() -> None:
    found = json.loads((ROOT / "hparams.json").read_text(encoding="utf-8"))
    for section, names in found.items():
        assert list(names) == list(Hparams.model_fields[section].annotation.model_fields), section  # type: ignore


def test_there_are_fewer_than_90_settings() -> None:
    assert 40 < len(fields()) < 90


def test_settings_are_frozen() -> None:
    hparams = make_hparams(LENGTH)
    for owner, name in ((hparams, "model"), (hparams.train, "seed"), (hparams.model, "unheard_of")):
        with pytest.raises(ValidationError, match="frozen|extra"):
            setattr(owner, name, 1)


# what is given; what the message must hold: the setting, its value, what is needed, what to do
MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": (merged(model={"n_expert": 4}), ["model.n_expert", "no such setting", "Did you mean 'n_experts'"]),
    "bias without rate": (
        merged(model={"selection_bias": True}),
        ["model.selection_bias is true", "balance.bias_rate is null", "Set both"],
    ),
    "rate without bias": (
        merged(balance={"bias_rate": 0.1}),
        ["model.selection_bias is false", "balance.bias_rate is 0.1", "Set both"],
    ),
    "odd heads cannot turn": (
        merged(model={"positions": "rope", "d_model": 30, "n_heads": 6}),
        ["positions is rope", "a head is 5 wide", "d_model / n_heads is even"],
    ),
    "unknown positions": (merged(model={"positions": "alibi"}), ["model.positions", '"alibi"', "'learned' or 'rope'"]),
    "dense with a shared expert": (
        merged(model={"n_experts": 1, "top_k": 1, "shared_expert": 8}),
        ["n_experts is 1 and shared_expert is set", "Set model.shared_expert to 0"],
    ),
    "dense with a bias": (
        merged(model={"n_experts": 1, "top_k": 1, "selection_bias": True}, balance={"bias_rate": 0.1}),
        ["n_experts is 1 and selection_bias is set", "Set model.selection_bias to false"],
    ),
    "far key": (merged(balance={"qqqq": 4}), ["balance.qqqq", "no such setting", "Known here: loss, alpha"]),
    "misspelt section": (merged(modle={}), ["modle", "no such setting", "Did you mean 'model'"]),
    "section is a number": (merged(model=5), ["model is 5", "must be", "object"]),
    "string for a number": (merged(model={"n_layers": "4"}), ["model.n_layers", '"4"', "must be", "integer"]),
    "fraction for a count": (merged(model={"n_layers": 4.5}), ["model.n_layers", "4.5", "integer"]),
    "number for a switch": (merged(model={"tie_embeddings": 1}), ["model.tie_embeddings", "1", "boolean"]),
    "null for a number": (merged(model={"dropout": None}), ["model.dropout", "null", "number"]),
    "too small": (merged(model={"n_layers": 0}), ["model.n_layers", "0", "greater than or equal to 1", "default, 4"]),
    "too large": (merged(model={"dropout": 1}), ["model.dropout", "1", "less than 1", "default, 0.1"]),
    "no such choice": (merged(train={"train_steps": 1, "precision": "int8"}), ["train.precision", '"int8"', "'bf16'"]),
    "a list with a number": (
        merged(data={"source": "files", "files": ["a", 7]}),
        ["data.files.1 is 7", "must be a valid string"],
    ),
    "one beta": (merged(optim={"betas": [0.9]}), ["optim.betas.1", "missing", "Add it"]),
    "beta of 1": (merged(optim={"betas": [0.9, 1.0]}), ["betas is [0.9, 1.0]", "below 1", "optim.betas"]),
    "heads": (
        merged(model={"d_model": 100, "n_heads": 8}),
        ["d_model is 100", "n_heads is 8", "evenly", "model.n_heads to 5", "multiple of 8"],
    ),
    "experts": (
        merged(model={"d_ff": 100, "n_experts": 8}),
        ["d_ff is 100", "n_experts is 8", "evenly", "Set model.d_ff to 104"],
    ),
    "top_k": (
        merged(model={"n_experts": 4, "top_k": 5}),
        ["top_k is 5", "n_experts is 4", "can't use more", "Set model.top_k to at most 4"],
    ),
    "min_lr": (merged(optim={"lr": 0.1, "min_lr": 0.2}), ["min_lr is 0.2", "lr is 0.1", "Set optim.min_lr"]),
    "no length": ({"train": {}}, ["none of", "train_steps, train_tokens, time_budget", "Set exactly one"]),
    "no train section": ({}, ["train", "missing", "Add it", "train_steps"]),
    "two lengths": (
        {"train": {"train_steps": 1, "time_budget": 1}},
        ["train_steps and time_budget", "are set", "Set exactly one"],
    ),
    "auto without a whole": (
        {"train": {"train_steps": 1, "batch_size": "auto"}},
        ['batch_size is "auto"', "must not depend on memory", "Set train.global_batch_size"],
    ),
    "another word than auto": (
        {"train": {"train_steps": 1, "batch_size": "big"}},
        ['train.batch_size is "big"', 'an integer from 1 to 1048576, or "auto"', "default, 8"],
    ),
    "two ways to cut a step": (
        {"train": {"train_steps": 1, "global_batch_size": 16, "gradient_accumulation": 2}},
        ["gradient_accumulation is 2", "global_batch_size is 16", "Set train.gradient_accumulation to 1"],
    ),
    "a part larger than the whole": (
        {"train": {"train_steps": 1, "batch_size": 8, "global_batch_size": 6}},
        ["batch_size is 8", "global_batch_size is 6", "Set train.batch_size to at most 6"],
    ),
    "a limit for a given size": (
        {"train": {"train_steps": 1, "memory_limit_gb": 2}},
        ["memory_limit_gb is 2", "batch_size is 8", 'Set train.batch_size to "auto"'],
    ),
    "files without files": (merged(data={"source": "files"}), ['source is "files"', "files is null", "Set data.files"]),
    "hub without dataset": (merged(data={"source": "hub"}), ['source is "hub"', "dataset is null", "data.dataset"]),
    "mix without sources": (merged(data={"source": "mix"}), ["mix is empty", "data.mix", "weight"]),
    "mix of a mix": (merged(data={"source": "mix", "mix": [{"source": "mix"}]}), ['is a "mix" itself', "data.mix"]),
    "unknown in a mix": (
        merged(data={"source": "mix", "mix": [{"source": "embedded", "weigth": 1}]}),
        ["data.mix.0.weigth", "no such setting", "Did you mean 'weight'"],
    ),
    "weight in a mix": (
        merged(data={"source": "mix", "mix": [{"source": "embedded", "weight": 0}]}),
        ["data.mix.0.weight is 0", "greater than 0", "default, 1.0"],
    ),
    "masking one document a row": (
        merged(data={"packing": False, "mask_documents": True}),
        ["mask_documents is true", "packing is false", "rows of several documents", "Set data.packing to true"],
    ),
    "not a number": (merged(optim={"lr": float("nan")}), ["optim.lr", "NaN", "finite"]),
    "infinite": (merged(optim={"weight_decay": float("inf")}), ["optim.weight_decay", "Infinity", "finite"]),
    "seed past int64": ({"train": {"train_steps": 1, "seed": 2**80}}, ["train.seed", "1208925819614629174706176"]),
    "lone surrogate": (merged(data={"source": "\ud800"}), ["hex escape", "Mend the value"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_explained(mistake: str) -> None:
    data, expected = MISTAKES[mistake]
    text = message(data)
    for part in expected:
        assert part in text
    assert len(text.splitlines()) == (3 if mistake == "a list with a number" else 2), text  # the list, and its item
    assert all(len(line) < 400 for line in text.splitlines()), text


def test_every_wrong_setting_is_named_at_once() -> None:
    text = message(merged(model={"n_layers": 0, "dropuot": 0.1}, optim={"lr": -1}))
    assert len(text.splitlines()) == 4
    assert "3 settings don't fit" in text
    assert all(name in text for name in ("model.n_layers", "model.dropuot", "'dropout'", "optim.lr"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{'a': 1}", ["not valid JSON", "line 1", "Mend"]),
        ('{"train": {"train_steps": 1}', ["not valid JSON", "Mend"]),
        ("", ["not valid JSON", "Mend"]),
        ('{"train": {"train_steps": 1, "train_steps": 2}}', ["'train_steps' twice", "Keep one"]),
        ('[{"train": {}}]', ["list", "one JSON object"]),
        ("7", ["int", "one JSON object"]),
        ('{"optim": {"lr": NaN}, "train": {"train_steps": 1}}', ["optim.lr", "NaN", "finite"]),
        ('{"optim": {"lr": 1e999}, "train": {"train_steps": 1}}', ["optim.lr", "Infinity", "finite"]),
        ('{"train": {"train_steps": ' + "1" * 5000 + "}}", ["not valid JSON", "Mend"]),
        ("[" * 100_000, ["not valid JSON", "Mend"]),
        (
            '{"train": {"train_steps": 1}, "x": ' + "[" * 900 + "]" * 900 + "}",
            ["nests deeper than 64", "Mend"],
        ),
    ],
    ids=["quotes", "cut", "empty", "twice", "list", "number", "NaN", "1e999", "5000 digits", "deep", "deep value"],
)
def test_a_damaged_file_is_explained(tmp_path: Path, content: str, expected: list[str]) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError) as caught:
        read_hparams(path)
    text = str(caught.value)
    assert str(path) in text
    for part in expected:
        assert part in text
    assert len(text) < 600


def test_bytes_that_are_not_text_and_files_that_are_not_there_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with pytest.raises(UserError, match="no settings file .*settings.json.* Give"):
        read_hparams(path)
    path.write_bytes(b'{"train": "\xff"}')
    with pytest.raises(UserError, match=r"settings.json is not valid JSON.*utf-8.*Mend"):
        read_hparams(path)
    with pytest.raises(UserError, match="is a folder. It must be a file. Give"):
        read_hparams(tmp_path)


@pytest.mark.parametrize(
    ("change", "section", "key", "value"),
    [
        ("train.seed=7", "train", "seed", 7),
        ("model.d_embed=null", "model", "d_embed", None),
        ("model.dropout=0.25", "model", "dropout", 0.25),
        ("data.packing=false", "data", "packing", False),
        ("optim.betas=[0.5, 0.6]", "optim", "betas", (0.5, 0.6)),
        ("optim.schedule=linear", "optim", "schedule", "linear"),
        ('optim.schedule="linear"', "optim", "schedule", "linear"),
        ("data.files=a=b.txt", "data", "files", "a=b.txt"),
        ('data.files=["a","b"]', "data", "files", ["a", "b"]),
        ("train.sample_prompt=", "train", "sample_prompt", ""),
    ],
)
def test_set_takes_json_and_else_a_string(tmp_path: Path, change: str, section: str, key: str, value: Any) -> None:
    hparams = read_hparams(write(tmp_path, LENGTH), [change])
    assert getattr(getattr(hparams, section), key) == value


def test_setting_one_length_clears_the_other(tmp_path: Path) -> None:
    path = write(tmp_path, LENGTH)
    tokens = read_hparams(path, ["train.train_tokens=1000"]).train
    assert (tokens.train_steps, tokens.train_tokens) == (None, 1000)
    back = read_hparams(path, ["train.train_tokens=1000", "train.train_steps=9"]).train
    assert (back.train_steps, back.train_tokens) == (9, None)
    with pytest.raises(UserError, match="none of"):
        read_hparams(path, ["train.train_steps=null"])


@pytest.mark.parametrize("change", ["", "train", "train.seed", "seed=1", "=1", ".seed=1", "train.=1", "train=1"])
def test_a_badly_formed_set_is_explained(tmp_path: Path, change: str) -> None:
    with pytest.raises(UserError, match=r"--set '.*Write --set section.key=value"):
        read_hparams(write(tmp_path, LENGTH), [change])


@pytest.mark.parametrize("value", ["NaN", "1" * 5000, "[" * 100_000])
def test_a_wild_value_of_set_is_explained_briefly(tmp_path: Path, value: str) -> None:
    with pytest.raises(UserError, match=r"train\.seed") as caught:
        read_hparams(write(tmp_path, LENGTH), [f"train.seed={value}"])
    assert len(str(caught.value)) < 600


def test_set_into_a_section_that_is_no_object_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="section 'model' is 3.*must be an object"):
        read_hparams(write(tmp_path, merged(model=3)), ["model.n_layers=2"])


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (12, 1), (13, 2), (24, 2), (25, 3), (1200, 100)])
def test_total_steps_of_train_tokens_rounds_up(tokens: int, steps: int) -> None:
    train = {"train_tokens": tokens, "batch_size": 2, "gradient_accumulation": 3}
    hparams = make_hparams({"train": train, "model": {"max_length": 2}})
    assert hparams.tokens_per_step == 12
    assert hparams.total_steps == steps


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"batch_size": 8, "gradient_accumulation": 3}, [8, 8, 8]),
        ({"batch_size": 8, "global_batch_size": 30}, [8, 8, 8, 6]),
        ({"batch_size": 8, "global_batch_size": 24}, [8, 8, 8]),
    ],
)
def test_micro_batches_make_up_the_step(train: dict[str, Any], expected: list[int]) -> None:
    hparams = make_hparams({"train": {"train_steps": 1, **train}, "model": {"max_length": 4}})
    assert hparams.micro_batches == expected and hparams.tokens_per_step == 4 * sum(expected)


def bounds() -> list[tuple[str, str, float, bool]]:
    """Every numeric limit as (section, key, value at the limit, whether it is allowed)."""
    found = []
    for section, key, field in fields():
        for limit in field.metadata:
            for kind, attribute, allowed in ((Ge, "ge", True), (Gt, "gt", False), (Le, "le", True), (Lt, "lt", False)):
                if isinstance(limit, kind):
                    found.append((section, key, getattr(limit, attribute), allowed))
                    if allowed:
                        beyond = -1 if kind is Ge else 1
                        found.append((section, key, getattr(limit, attribute) + beyond, False))
    return found


# what else must change for a value at its limit to fit the others
COMPANY: dict[str, dict[str, Any]] = {
    "model.d_model": {"n_heads": 1},
    "model.d_ff": {"n_experts": 1, "top_k": 1},
    "model.n_heads": {"d_model": 4096},
    "model.n_experts": {"top_k": 1, "d_ff": 16384},
    "train.global_batch_size": {"batch_size": 1},
}


def test_every_range_is_honoured() -> None:
    checked = bounds()
    assert len(checked) > 50
    for section, key, value, allowed in checked:
        data = {"train": {"train_steps": 1}}
        data.setdefault(section, {}).update({key: value, **COMPANY.get(f"{section}.{key}", {})})
        if key == "train_tokens":
            data["train"]["train_steps"] = None  # type: ignore[assignment]
        if allowed:
            assert getattr(getattr(make_hparams(data), section), key) == value
        else:
            assert re.search(rf"{section}\.{key} is {value}\. It must be", message(data))


def test_every_number_and_every_name_has_a_range_or_a_reason() -> None:
    """A count without a lower limit would let -1 through."""
    for section, key, field in fields():
        if field.annotation in (int, float, int | None, float | None):
            assert any(isinstance(limit, Ge | Gt) for limit in field.metadata), f"{section}.{key}"
