"""What `moelet inspect` finds: measures against slow definitions, routing against the model's own statistics, a model
that learned code and prose, and the page.
"""

import argparse
import ast
import base64
import copy
import dataclasses
import hashlib
import inspect as sources
import json
import math
import re
import tarfile
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TinySettings, save_run
from test_report import HOSTILE, Page

from moelet.cli import main
from moelet.data import read_validation
from moelet.evaluate import evaluate
from moelet.hparams import make_hparams
from moelet.inspection.figures import first_rows, short_names
from moelet.inspection.page import page_of
from moelet.inspection.routing import mixtures, output_similarity, predicted_bytes, record, row_nats, without_each
from moelet.inspection.specialisation import (
    agreement,
    halves_apart,
    jensen_shannon,
    lift,
    taken,
    together,
    told_by_token,
    use_of,
)
from moelet.inspection.token_classes import CLASSES, FUNCTION_WORDS, SYMBOLS, classes_of
from moelet.inspection.words import sentences
from moelet.modelling import GPT
from moelet.moe import MoE
from moelet.tokenizer import Tokenizer

# measures


def some_choices(n: int = 400, n_experts: int = 5, top_k: int = 2) -> np.ndarray:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(n, n_experts)) + np.linspace(0, 1, n_experts)
    return np.argsort(-scores, axis=1)[:, :top_k].astype(np.int16)


def test_what_experts_take_equals_counting() -> None:
    chosen, kinds = some_choices(), np.random.default_rng(1).integers(0, 4, 400)
    counts = taken(kinds, chosen, 4, 5)
    ratio = lift(counts, np.bincount(kinds, minlength=4))
    for e in range(5):
        mine = [t for t in range(400) if e in chosen[t]]
        assert use_of(chosen, 5)[e] == pytest.approx(len(mine) / 800)
        for kind in range(4):
            ours = [t for t in mine if kinds[t] == kind]
            assert counts[e, kind] == len(ours)
            share = sum(kinds == kind) / 400
            assert ratio[e, kind] == pytest.approx(len(ours) / len(mine) / share)
    assert np.isnan(lift(np.array([[0, 0]]), np.array([3, 3]))).all()


def test_pairs_are_counted_against_what_loads_make_of_them() -> None:
    chosen = some_choices()
    found = together(chosen, 5)
    assert found is not None
    pairs = np.array([[sum({a, b} <= set(row) for row in chosen.tolist()) for b in range(5)] for a in range(5)])
    load = [sum(a in row for row in chosen.tolist()) for a in range(5)]
    chance = np.array([[load[a] * load[b] * (a != b) for b in range(5)] for a in range(5)], dtype=float)
    chance *= sum(pairs[a, b] for a in range(5) for b in range(5) if a != b) / chance.sum()
    for a in range(5):
        for b in range(5):
            assert math.isnan(found[a, b]) if a == b else found[a, b] == pytest.approx(pairs[a, b] / chance[a, b])
    assert together(some_choices(top_k=1), 5) is None and together(some_choices(top_k=5), 5) is None


def test_distances_of_known_distributions() -> None:
    def entropy(p: np.ndarray) -> float:
        return -sum(x * math.log2(x) for x in p if x)

    p, q = np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.1, 0.2, 0.3, 0.4])
    assert jensen_shannon(p, p) == 0 and jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    assert jensen_shannon(p, q) == pytest.approx(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)
    chosen, rows = some_choices(), np.repeat(np.arange(20), 20)
    alike = halves_apart(chosen, rows, 5)
    unlike = halves_apart((rows // 4)[:, None], rows, 5)
    assert alike is not None and unlike is not None
    assert alike[0] < 0.01 < 10 * alike[0] < unlike[0] and alike[0] <= alike[1]
    assert halves_apart(chosen, rows // 7, 5) is None


def test_a_choice_that_the_token_makes_is_told_by_it() -> None:
    ids, rows = np.tile([4, 9, 4, 7], 50), np.repeat(np.arange(10), 20)
    told, common = told_by_token(ids, (ids > 5).astype(np.int16), rows, 3)
    assert (told, common) == (1.0, 0.5)
    chance = np.random.default_rng(0).integers(0, 2, 200).astype(np.int16)
    assert 0.2 < told_by_token(ids, chance, rows, 3)[0] < 0.8
    assert all(map(math.isnan, told_by_token(ids[:20], chance[:20], rows[:20], 3)))


def test_agreement_counts_common_choices() -> None:
    a, b = some_choices(), some_choices()[::-1]
    shared, chance = agreement(a, b, 5)
    both = zip(a.tolist(), b.tolist(), strict=True)
    assert shared == pytest.approx(sum(len(set(x) & set(y)) for x, y in both) / 800)
    assert agreement(a, a[:, ::-1], 5)[0] == 1 and chance == pytest.approx(agreement(a, a, 5)[1])
    many = some_choices(20_000)
    shared, chance = agreement(many, np.roll(many, 1, axis=0), 5)
    assert shared == pytest.approx(chance, abs=0.01)


# classes of tokens

TEXT = """class Parser:
\tdef naïve_walk(self, x1=42):
        return "The cats' 10 names — don't (of Ann)" + x[3] # é\r
"""


def test_classes_are_those_of_the_text_around(tokenizer: Tokenizer) -> None:
    ids = np.array([tokenizer.bos_id, *tokenizer.encode(TEXT).tolist(), tokenizer.eos_id])
    classes = [CLASSES[k] for k in classes_of(tokenizer, ids)]
    assert classes[0] == classes[-1] == "start or end"
    assert set(classes) >= set(CLASSES) - {"capitalised"} and "capitalised" in classes
    place = 0
    for i, name in zip(ids[1:-1], classes[1:-1], strict=True):
        piece = tokenizer.pieces[i]
        if piece.startswith("<0x"):  # a byte of é, ï or —
            assert name == "other"
            continue
        place = TEXT.index(piece, place)
        body, before = piece.strip(), TEXT[place - 1] if place else " "
        place += len(piece)
        if "\n" in piece or "\r" in piece:
            assert name == "newline"
        elif not body:
            assert name == "space"
        elif body.isdigit():
            assert name == "digit"
        elif not any(map(str.isalnum, body)):
            assert name == ("symbol" if SYMBOLS & set(body) else "punctuation"), piece
        elif piece[0] != " " and ((before.isalnum() and before.isascii()) or before in "_'"):
            assert name == "word part", (before, piece)
        elif before.isascii():
            word = body.lower() in FUNCTION_WORDS
            assert name == ("function word" if word else "capitalised" if body[0].isupper() else "word"), piece


# routing


def make_model(hparams: Any, tokenizer: Tokenizer, scale: float = 3.0) -> GPT:
    """An untrained model whose routers have opinions."""
    torch.manual_seed(0)
    model = GPT(hparams.model, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.ndim == 1 else scale)
    return model


@pytest.mark.parametrize("data", [{}, {"packing": False}, {"mask_documents": True, "piece_chars": 100}])
def test_what_is_recorded_is_what_the_model_counts(
    data: dict[str, Any], tiny_settings: TinySettings, tokenizer: Tokenizer
) -> None:
    hparams = make_hparams(tiny_settings(data=data))
    model = make_model(hparams, tokenizer)
    text = read_validation(hparams.data, tokenizer, 32, 4, 1500, "validation")
    routes = record(model, text.batches, torch.float32)
    measured = evaluate(model, text, torch.float32)
    padding = sum(0 if b.segments is None else int((b.segments == 0).sum()) for b in text.batches)
    assert len(routes.ids_T) == sum(b.input_ids.numel() for b in text.batches) - padding
    row = routes.rows_T == 1
    assert routes.ids_T[row].tolist() == [int(i) for i in text.batches[0].input_ids[1] if i != tokenizer.pad_id]
    for layer, load in enumerate(measured.expert_load):
        assert (use_of(routes.chosen_LTK[layer], 4) * 4).tolist() == pytest.approx(load, rel=1e-5)
    with torch.no_grad():
        stats = model(text.batches[0].input_ids, text.batches[0].segments).router
    first = routes.rows_T < 4
    for layer, stat in enumerate(stats):
        entropy = stat.entropy / stat.tokens / math.log(4)
        assert routes.entropy_LT[layer][first].mean() == pytest.approx(float(entropy), rel=1e-4)
    assert predicted_bytes(text.batches, tokenizer.byte_lengths) == text.n_bytes
    assert row_nats(model, text.batches, torch.float32).sum() == pytest.approx(
        measured.loss * measured.tokens, rel=1e-5
    )
    assert all(400 < len(x_TD) <= 600 for x_TD in routes.inputs_LTD)
    cut = first_rows(text.batches, 6)
    assert [len(batch.input_ids) for batch in cut] == [4, 2]
    assert torch.equal(cut[1].labels, text.batches[1].labels[:2])


@pytest.mark.parametrize("model_settings", [{}, {"normalize_top_k": True}, {"selection_bias": True}])
def test_without_an_expert_is_a_model_that_never_had_it(
    model_settings: dict[str, Any], tiny_settings: TinySettings, tokenizer: Tokenizer
) -> None:
    balance = {"bias_rate": 0.01} if "selection_bias" in model_settings else {}
    given = {"n_layers": 1, **model_settings}
    hparams = make_hparams(tiny_settings(model=given, balance=balance))
    model = make_model(hparams, tokenizer)
    moe = model.layers[0].mlp
    assert isinstance(moe, MoE)
    if moe.gate.bias is not None:
        moe.gate.bias.copy_(torch.tensor([0.3, -0.2, 0.5, 0.0]))
    text = read_validation(hparams.data, tokenizer, 32, 4, 600, "validation")
    rise, error = without_each(model, text.batches, tokenizer.byte_lengths, torch.float32, lambda done: None)
    whole = row_nats(model, text.batches, torch.float32)
    for expert in range(4):
        smaller = GPT(
            make_hparams(tiny_settings(model={**given, "n_experts": 3, "d_ff": 48}, balance=balance)).model, 400
        )
        weights = dict(model.state_dict())
        kept = [e for e in range(4) if e != expert]
        for name in list(weights):
            if ".mlp." in name:
                weights[name] = weights[name][kept]
        smaller.load_state_dict(weights)
        rows = row_nats(smaller.eval(), text.batches, torch.float32) - whole
        per_byte = math.log(2) * text.n_bytes
        assert rise[0, expert] == pytest.approx(rows.sum() / per_byte, abs=2e-5)
        assert error[0, expert] == pytest.approx(math.sqrt(len(rows)) * rows.std(ddof=1) / per_byte, rel=1e-2)
    assert (np.abs(rise) > 1e-3).any()
    assert row_nats(model, text.batches, torch.float32).tolist() == whole.tolist(), "a switch was left on"


@torch.no_grad()
def test_likeness_of_outputs_knows_no_order_of_hidden_units(tiny_settings: TinySettings, tokenizer: Tokenizer) -> None:
    moe = mixtures(make_model(make_hparams(tiny_settings(model={"activation": "swiglu"})), tokenizer))[0]
    experts, order = moe.experts, torch.randperm(16)
    assert experts.gate_proj is not None
    for matrices in (experts.up_proj, experts.gate_proj):
        matrices[1], matrices[2] = matrices[0][order], matrices[0]
    experts.down_proj[1], experts.down_proj[2] = experts.down_proj[0][:, order], -experts.down_proj[0]
    found = output_similarity(moe, torch.randn(50, 32))
    assert found[0].tolist()[:3] == pytest.approx([1, 1, -1], abs=1e-5) and abs(found[0, 3]) < 0.5
    assert found == pytest.approx(found.T)


# a model that learned code and prose


class Corpora:
    """Paths of code and of prose, as many short documents, and of the prose in two parts."""

    def __init__(self, folder: Path) -> None:
        from pydoc_data.topics import topics

        modules = (argparse, ast, dataclasses, sources, tarfile, typing)
        whole = "\n".join(map(sources.getsource, modules))
        code = [text for text in re.split(r"\n(?= *def )", whole) if len(text) > 200]
        prose = [re.sub(r"\s+", " ", text) for _, text in sorted(topics.items())]  # without lines and indentation
        pieces = [text[k : k + 900] for text in prose for k in range(0, len(text), 900)]
        parts = {"code": code, "prose": pieces, "even": pieces[::2], "odd": pieces[1::2]}
        for name, texts in parts.items():
            rows = [json.dumps({"text": text}) for text in texts[:200]]
            (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        self.code, self.prose, self.even, self.odd = (str(folder / f"{name}.jsonl") for name in parts)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Corpora:
    return Corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def run(tiny_settings: TinySettings, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on code and prose in turn, with two checkpoints."""
    folder = tmp_path_factory.mktemp("mixed")
    mix = [{"source": "files", "files": path} for path in (corpora.code, corpora.prose)]
    settings = tiny_settings(
        model={"dropout": 0.0, "embed_scale": 8.0},
        data={"source": "mix", "mix": mix, "files": None, "shuffle_window": 256, "mix_unit": "characters"},
        train={"batch_size": 16, "train_steps": 60, "checkpoint_steps": 40, "log_steps": 10},
    )
    (folder / "mixed.json").write_text(json.dumps(settings))
    assert main(["train", str(folder / "mixed.json"), "--run", str(folder / "run")]) == 0
    return folder / "run"


def inspected(run: Path, folder: Path, *given: str) -> dict[str, Any]:
    paths = ["--json", str(folder / "found.json"), "--out", str(folder / "page.html")]
    assert main(["inspect", str(run), *given, *paths]) == 0
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def found(run: Path, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    given = [part for path in (corpora.code, corpora.prose) for part in ("--data", path)]
    return inspected(run, tmp_path_factory.mktemp("found"), *given, "--tokens", "5000", "--ablation-tokens", "500")


def test_code_and_prose_are_routed_apart(found: dict[str, Any]) -> None:
    assert [text["name"] for text in found["texts"]] == ["code.jsonl", "prose.jsonl"]
    ((pair,), halves) = found["apart"]["pairs"], found["apart"]["halves"]
    between, layer = max((value, k) for k, value in enumerate(pair["layers"]))
    mean, largest = (max(halves[name][layer][k] for name in halves) for k in range(2))
    assert between > 3 * largest and between > 12 * mean
    assert any("code.jsonl and prose.jsonl are routed apart" in sentence for sentence in found["sentences"])


def test_texts_of_one_kind_are_not(run: Path, corpora: Corpora, found: dict[str, Any], tmp_path: Path) -> None:
    given = ["--data", corpora.even, "--data", corpora.odd, "--tokens", "5000", "--ablation-tokens", "0"]
    alike = inspected(run, tmp_path, *given)
    apart = max(found["apart"]["pairs"][0]["layers"])
    assert 8 * max(alike["apart"]["pairs"][0]["layers"]) < apart
    assert alike["without"] == []


def test_the_findings_hang_together(found: dict[str, Any], run: Path) -> None:
    assert (found["step"], found["n_layers"], found["n_experts"], found["top_k"]) == (60, 2, 4, 2)
    tokens = [text["tokens"] for text in found["texts"]]
    for layer in found["layers"]:
        by_text = list(layer["load_by_text"].values())
        for e, expert in enumerate(layer["experts"]):
            mixed = sum(n * load[e] for n, load in zip(tokens, by_text, strict=True)) / sum(tokens)
            assert layer["load"][e] == pytest.approx(mixed, abs=1e-4)
            assert sum(expert["class_share"].values()) == pytest.approx(1, abs=1e-3)
            for token in expert["tokens_by_lift"]:
                assert 1 < token["lift"] <= 1.001 * 4 / layer["load"][e] / 2
            counts = [token["count"] for token in expert["tokens_by_share"]]
            assert counts == sorted(counts, reverse=True) and len(counts) == 12
        assert layer["told_by_token"] > layer["told_by_guess"]
        assert 0 < layer["entropy"] < 1
    assert [[text["text"], len(text["layers"])] for text in found["without"]] == [["code.jsonl", 2], ["prose.jsonl", 2]]
    assert max(rise for text in found["without"] for layer in text["layers"] for rise in layer["rise"]) > 0.01
    (pair,) = found["checkpoints"]
    assert pair["steps"] == [40, 60] and all(1 > a > c for a, c in zip(pair["agreement"], pair["chance"], strict=True))
    assert [row["step"] for row in found["training"]] == [1, *range(10, 61, 10)]
    assert len(found["shown"][0]["pieces"]) == 400 and np.shape(found["shown"][0]["experts"]) == (2, 400, 2)
    assert sentences(found) == found["sentences"]


def test_a_mix_is_looked_at_part_by_part(run: Path, tmp_path: Path) -> None:
    held_out = inspected(run, tmp_path, "--tokens", "600", "--ablation-tokens", "40")
    assert [text["name"] for text in held_out["texts"]] == ["code.jsonl", "prose.jsonl"]
    assert all(text["bytes"] < 12_000 for text in held_out["texts"])


def test_names_are_short_where_they_can_be() -> None:
    assert short_names(["a/x.txt", "b/x.txt", "c/y.txt", "embedded"]) == ["a/x.txt", "b/x.txt", "y.txt", "embedded"]
    assert short_names(["embedded", "embedded", ".."]) == ["embedded (1)", "embedded (2)", ".."]


# the page


def check_page(page: bytes, path: Path) -> Page:
    """Assert that the page is whole, that one script runs, known by its hash, and that nothing comes from outside."""
    path.write_bytes(page)
    read = Page(path)
    assert [tag for tag, _ in read.elements].count("script") == 1
    (code,) = re.findall(r"<script>(.*?)</script>", page.decode(), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"img-src data:; script-src 'sha256-{digest}'\"" in page.decode()
    read.elements = [element for element in read.elements if element[0] != "script"]
    return read.check()


def test_the_page_shows_it_all_and_nothing_of_strangers_runs(found: dict[str, Any], tmp_path: Path) -> None:
    hostile = copy.deepcopy(found)
    hostile["shown"][0]["text"] = hostile["texts"][0]["name"] = hostile["without"][0]["text"] = HOSTILE
    hostile["shown"][0]["pieces"][5] = hostile["layers"][0]["experts"][0]["tokens_by_share"][0]["piece"] = HOSTILE
    hostile["sentences"][0] = HOSTILE
    page = check_page(page_of(hostile), tmp_path / "page.html")
    assert "U+202E" in page.text and "<script>alert(2)</script>" in page.text
    assert {"chosen together", "alike in output"} <= {str(chart).split(": ")[-1] for chart in page.charts}
    assert "load of each expert in each layer" in page.charts and "distance by layer" in page.charts
    shaded = [attributes for tag, attributes in page.elements if tag == "span" and "data-experts" in attributes]
    assert len(shaded) == 800
    experts = [layer.split() for layer in str(shaded[7]["data-experts"]).split("|")]
    assert experts == [[str(e) for e in layer[7]] for layer in found["shown"][0]["experts"]]
    for title in ("What stands out", "What each expert takes", "Texts apart", "Switched off", "Checkpoints"):
        assert title in page.text


ODD: dict[str, dict[str, Any]] = {
    "top 1": {"top_k": 1},
    "all experts": {"top_k": 4},
    "one layer, many experts": {"n_layers": 1, "n_experts": 16, "d_ff": 128, "shared_expert": 16},
}


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_and_a_text_of_one_row(
    name: str, tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    hparams = make_hparams(tiny_settings(model=ODD[name]))
    run = save_run(tmp_path / "run", hparams, make_model(hparams, tokenizer), tokenizer)
    for file in ("a", "b"):
        (tmp_path / f"{file}.txt").write_text("def parse(self):")
    given = [part for file in ("a", "b") for part in ("--data", str(tmp_path / f"{file}.txt"))]
    found = inspected(run, tmp_path, *given)
    assert found["checkpoints"] == found["training"] == []
    assert found["apart"]["halves"] == {
        "a.txt": [None] * hparams.model.n_layers,
        "b.txt": [None] * hparams.model.n_layers,
    }
    assert all((layer["together"] is None) == (ODD[name].get("top_k") is not None) for layer in found["layers"])
    assert any("too short" in sentence for sentence in found["sentences"])
    page = check_page((tmp_path / "page.html").read_bytes(), tmp_path / "again.html")
    assert not re.search(r"\b(nan|inf|None)\b", page.text)


def test_a_dense_run_is_refused(
    tiny_settings: TinySettings, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hparams = make_hparams(tiny_settings(model={"n_experts": 1, "top_k": 1}))
    run = save_run(tmp_path / "run", hparams, make_model(hparams, tokenizer), tokenizer)
    assert main(["inspect", str(run)]) == 78
    said = capsys.readouterr().err
    assert "is a dense run" in said and f"moelet upcycle {run}" in said
    assert not (run / "inspect.html").exists()
