"""The report on run folders made up here: no training, no torch."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from moelet.errors import UserError
from moelet.hparams import make_hparams
from moelet.page import short
from moelet.report import read_metrics, smooth, write_loss_curve, write_report

HOSTILE = "<img src=x onerror=alert(1)></pre><script>alert(2)</script> \ud800 & \u202e 'quoted'"
VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use", "image"}


def make_rows(
    steps: int = 170, layers: int = 4, experts: int = 8, every: int = 40, log: int = 1
) -> list[dict[str, Any]]:
    """Return the rows of a believable run: loss from 8.3 to about 2.6, `experts` 0 for a dense one."""
    rng = random.Random(0)
    lean = [[rng.gauss(0, 0.35) for _ in range(experts)] for _ in range(layers)]
    rows = []
    for step in [s for s in range(1, steps + 1) if s == 1 or s % log == 0 or s == steps]:
        done = step / steps
        loss = 2.55 + 6.6 * math.exp(-((done * 9) ** 0.62)) + rng.gauss(0, 0.07)
        settle = 0.25 + 1.6 * math.exp(-done * 7)
        load = [[math.exp(settle * x + rng.gauss(0, 0.04)) for x in layer] for layer in lean]
        load = [[x * experts / sum(layer) for x in layer] for layer in load] if experts else []
        row = {
            "step": step, "tokens": step * 4096, "seconds": step * 1.37, "loss": loss, "bits_per_byte": loss * 0.437,
            "balance_loss": 1 + 0.4 * settle**2, "lr": 1e-3 * min(step / 17, 0.55 + 0.45 * math.cos(math.pi * done)),
            "grad_norm": 0.5 + 3 * math.exp(-done * 20) + abs(rng.gauss(0, 0.12)),
            "tokens_per_second": 1500 if step == 1 else 2990 + rng.gauss(0, 60), "mfu": 0.41 + rng.gauss(0, 0.01),
            "expert_load": load, "memory_mb": 1893.4,
        }  # fmt: skip
        if (every and step % every == 0) or step == steps:
            held = loss + 0.12 - 0.08 * (1 - done)
            words = ["the", "of", "a", "river", "she", "said", "light", "under", "house", "and", "it", "was", "stone"]
            row |= {"val_loss": held, "val_bits_per_byte": held * 0.437, "gzip_bits_per_byte": 2.913, "padding": 0.0021}
            row |= {"sample": " ".join(rng.choices(words, k=60)), "documents": step * 11}
            row |= {"skipped": {"empty": 3, "not UTF-8": step // 40}}
        rows.append(row)
    return rows


def make_run(path: Path, rows: list[dict[str, Any]], **model: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    settings = {"model": model, "train": {"train_steps": 170}}
    (path / "hparams.json").write_text(make_hparams(settings).to_json(), encoding="utf-8")
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text, and whether the elements nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", list[str]()
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def check(self) -> "Page":
        """Assert that elements nest, nothing runs, and nothing comes from outside."""
        assert not self.open
        for tag, attributes in self.elements:
            assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "img")
            for name, value in attributes.items():
                assert not name.startswith("on")
                if name in ("src", "href", "xlink:href", "action", "data"):
                    assert (value or "").startswith(("#", "data:image/png;base64,"))
                assert not re.search(r"url\((?!#)|@import|https?:", value or ""), (tag, name, value)
        return self

    @property
    def charts(self) -> list[str | None]:
        return [attributes["aria-label"] for tag, attributes in self.elements if tag == "svg"]


def png_size(path: Path) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width, _ = imread(path).shape
    return width, height


def slow_average(values: list[float], beta: float) -> list[float]:
    averages = []
    for t in range(len(values)):
        finite = [v for v in values[: t + 1] if math.isfinite(v)]
        weights = [beta ** (len(finite) - 1 - i) for i in range(len(finite))]
        averages.append(sum(w * v for w, v in zip(weights, finite, strict=True)) / sum(weights) if finite else math.nan)
    return averages


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.98])
def test_smooth_equals_its_definition(beta: float) -> None:
    rng = random.Random(1)
    values = [rng.gauss(3, 1) for _ in range(50)]
    values[0], values[7], values[20] = math.nan, math.inf, math.nan
    assert smooth(values, beta) == pytest.approx(slow_average(values, beta), nan_ok=True)


def test_smooth_of_a_constant_is_the_constant_from_the_first_value() -> None:
    assert smooth([4.2] * 5) == pytest.approx([4.2] * 5)
    assert smooth([]) == []


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (999_999, "1M"), (1_234_567, "1.23M"), (0.0005, "0.0005")]
)
def test_numbers_are_shortened_without_losing_their_size(value: float, text: str) -> None:
    assert short(value) == text


def test_metrics_leave_out_a_line_cut_short_and_name_a_damaged_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_rows(5))
    file = run / "metrics.jsonl"
    whole = file.read_text()
    file.write_text(whole + whole.splitlines()[0][:40])
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]
    file.write_text(whole + "\0" * 100)
    assert len(read_metrics(run)) == 5
    file.write_text(whole.splitlines()[0] + "\n{broken\n" + whole)
    with pytest.raises(UserError, match="line 2 is damaged"):
        read_metrics(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for write in (read_metrics, write_loss_curve, write_report):
        with pytest.raises(UserError, match=r"metrics\.jsonl can't be read"):
            write(tmp_path)
    run = make_run(tmp_path / "run", [])
    with pytest.raises(UserError, match="no logged step"):
        write_report(run)
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 1.0}\n')
    (run / "hparams.json").unlink()
    with pytest.raises(UserError, match="no settings file"):
        write_loss_curve(run)


def test_loss_curve_is_a_picture_of_the_promised_size(tmp_path: Path) -> None:
    path = write_loss_curve(make_run(tmp_path / "run", make_rows()))
    assert path == tmp_path / "run" / "loss_curve.png"
    assert png_size(path) == (1600, 900)


def test_the_first_steps_and_a_spike_do_not_set_the_loss_axis(tmp_path: Path) -> None:
    from moelet.report import _loss_figure, _read_run

    rows = make_rows()
    rows[100]["loss"] = 1e4
    axes = _loss_figure(_read_run(make_run(tmp_path / "run", rows))).axes[0]
    low, high = axes.get_ylim()
    assert low < rows[-1]["loss"] < rows[-1]["val_loss"] < high < 8
    assert any(text.get_text() == f"starts at {rows[0]['loss']:.2f}" for text in axes.texts)


def test_report_is_one_safe_page_with_everything(tmp_path: Path) -> None:
    rows = make_rows()
    rows[39]["sample"] = HOSTILE
    rows[39]["skipped"] = rows[-1]["skipped"] = {"<b>bold</b>": 2}
    run = make_run(tmp_path / "a <i>run</i>", rows)
    page = Page(write_report(run)).check()
    source = (run / "report.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in str(page.elements)
    assert "prefers-color-scheme:dark" in source
    assert HOSTILE.replace("\ud800", "?") in page.text and "<b>bold</b>" in page.text and "a <i>run</i>" in page.text
    charts = ["loss against tokens", "learning rate", "gradient norm", "tokens per second", "balance loss"]
    assert page.charts == [*charts, "load of each expert in each layer"]
    assert re.findall(r"<b>step (\d+)</b>", source) == ["40", "80", "120", "160", "170"]
    for text in ("finished: step 170 of 170", f"{rows[-1]['val_loss']:.3f}", "gzip -9 needs 2.913", "696k", "1,893 MB"):
        assert text in page.text
    for text in ("n_experts", "grad_clip", "moelet train --resume '", "moelet evaluate '", "documents read", "0.21%"):
        assert text in page.text


def test_fp16_a_mix_and_a_planned_length_are_shown(tmp_path: Path) -> None:
    rows = make_rows(steps=120)
    share = {"source": "books & <more>", "asked": 0.7, "documents": 0.6999, "characters": 0.913}
    for row in rows:
        row |= {"loss_scale": 2.0**15, "skipped_steps": 3, "total_steps": None if row["step"] < 9 else 120}
    rows[-1]["mix"] = [share]
    page = Page(write_report(make_run(tmp_path / "run", rows)))
    assert "fp16 loss scale" in page.text
    assert "from books & <more>" in page.text and "70.0% of documents, 91.3% of characters; asked 70.0%" in page.text
    assert "finished: step 120 of 120" in page.text, "the plan counts, not the 170 steps of the settings"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", make_rows(30))
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def odd_runs() -> dict[str, tuple[list[dict[str, Any]], dict[str, Any]]]:
    bare = [{"step": 1, "tokens": 512, "loss": 8.3}]
    nan = [
        row | {"loss": math.nan, "grad_norm": math.nan, "mfu": None, "lr": math.inf} for row in make_rows(30, layers=1)
    ]
    dead = make_rows(30)
    for row in dead:
        row["expert_load"] = [[0.0, 2.0, None, math.nan]]
    diverged = make_rows(60, layers=1)
    for row in diverged[30:]:
        row["loss"] = math.nan
    return {
        "one row": (make_rows(1, layers=2), {}),
        "one bare row": (bare, {}),
        "one row, loss 0": ([bare[0] | {"loss": 0.0, "tokens": 0, "val_loss": 0.0, "val_bits_per_byte": 0.0}], {}),
        "no evaluation": ([row for row in make_rows(layers=1) if "val_loss" not in row], {}),
        "dense": (make_rows(experts=0), {"n_experts": 1, "top_k": 1}),
        "interrupted": (make_rows(layers=2)[:97], {}),
        "all NaN": (nan, {}),
        "diverged": (diverged, {}),
        "dead experts, missing values": (dead, {}),
        "many experts": (make_rows(20, layers=1, experts=64), {"n_experts": 64}),
        "few points": (make_rows(log=10, layers=1), {}),
    }


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", odd_runs())
def test_odd_runs(tmp_path: Path, name: str) -> None:
    rows, model = odd_runs()[name]
    run = make_run(tmp_path / "run", rows, **model)
    assert png_size(write_loss_curve(run)) == (1600, 900)
    page = Page(write_report(run)).check()
    assert ("load of each expert in each layer" in page.charts) == bool(rows[-1].get("expert_load"))
    assert ("finished: step 170" in page.text.replace("unfinished", "")) == (rows[-1]["step"] == 170)
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
