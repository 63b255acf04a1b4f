"""What a run says about itself: metrics.jsonl survives a crash, loads are counted right, the progress line is whole."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moelet import console, metrics
from moelet.console import Progress, duration, progress_line, table
from moelet.metrics import append_metrics, cut_metrics, expert_load, matrix_rate, peak_memory_mb, router_health
from moelet.moe import RouterStats, add_stats
from moelet.report import read_metrics

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_appended_one_a_line_and_floats_come_back_exactly(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"step": 1, "loss": 0.1 + 0.2, "sample": "two\nlines\u2028 of é\U0001f600"},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 5e-324},
    ]
    for row in rows:
        append_metrics(tmp_path, row)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[0]) == rows[0] and json.loads(lines[2]) == rows[2]
    assert math.isnan(json.loads(lines[1])["loss"])


@pytest.mark.parametrize("at", [0, 1, 5, 7, 10, 99])
def test_cutting_drops_the_later_steps_and_only_those(tmp_path: Path, at: int) -> None:
    for step in range(1, 11):
        append_metrics(tmp_path, {"step": step, "tokens": 9, "sample": "\u2028é"})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    cut_metrics(tmp_path, at)
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[:at])
    append_metrics(tmp_path, {"step": at + 1, "tokens": 9})
    assert steps(tmp_path) == [*range(1, min(at, 10) + 1), at + 1]


def test_a_last_line_cut_anywhere_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    rows = [json.dumps({"step": step, "tokens": 9, "loss": 1.5, "sample": "é"}) + "\n" for step in (1, 2, 3)]
    whole = "".join(rows).encode()
    for end in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:end])
        cut_metrics(tmp_path, 9)
        complete = sum(end >= len("".join(rows[: k + 1])) - 1 for k in range(3))  # its newline may be missing
        assert steps(tmp_path) == [1, 2, 3][:complete]
        append_metrics(tmp_path, {"step": 4, "tokens": 9})
        assert steps(tmp_path) == [*[1, 2, 3][:complete], 4]


def test_a_line_that_is_no_steps_is_dropped(tmp_path: Path) -> None:
    """The report at the run's end would name it as damage."""
    whole = {"step": 1, "tokens": 9}
    odd = [
        {"step": 2},
        *({"step": 2, "tokens": value} for value in (None, "9", True, float("nan"))),
        {"tokens": 9},
        [2],
    ]
    append_metrics(tmp_path, whole)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in odd))
    cut_metrics(tmp_path, 9)
    append_metrics(tmp_path, {"step": 3, "tokens": 27})
    assert read_metrics(tmp_path) == [whole, {"step": 3, "tokens": 27}]


def test_cutting_without_a_file_makes_none(tmp_path: Path) -> None:
    cut_metrics(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_death_while_cutting_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_metrics(tmp_path, {"step": 1, "tokens": 9})
    append_metrics(tmp_path, {"step": 2, "tokens": 9})

    def die(*given: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, name, die)
            cut_metrics(tmp_path, 1)
        assert steps(tmp_path) == [1, 2]
    cut_metrics(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def stats(assignments: list[float], tokens: float, entropy: float = 0.0, largest: float = 0.0) -> RouterStats:
    numbers = (torch.tensor(number) for number in (tokens, 0.0, entropy, largest))
    return RouterStats(torch.ones(len(assignments)), torch.tensor(assignments), *numbers)


def test_expert_load_against_a_hand_count() -> None:
    # three tokens, two experts each: expert 0 twice, expert 1 three times, expert 3 once; fair would be 1.5 each
    uneven, even, none = stats([2.0, 3.0, 0.0, 1.0], 3.0), stats([5.0, 5.0, 5.0, 5.0], 10.0), stats([0.0] * 4, 0.0)
    load = expert_load([uneven, even, none]).tolist()
    assert load[0] == pytest.approx([4 / 3, 2.0, 0.0, 2 / 3])
    assert load[1:] == [[1.0] * 4, [0.0] * 4]
    assert expert_load([]).tolist() == []
    assert all(isinstance(share, float) for share in load[0])


def test_router_health_against_a_hand_count() -> None:
    # of four experts the entropy is at most ln 4; three tokens with ln 2 each are half of that
    layers = [stats([3.0, 3.0, 0.0, 0.0], 3.0, 3 * math.log(2), 5.5), stats([0.0] * 4, 0.0)]
    entropy, largest = router_health(layers).tolist()
    assert entropy == pytest.approx([0.5, 0.0]) and largest == [5.5, 0.0]
    assert router_health([]).tolist() == [[], []]


def test_micro_batches_add_up_but_for_the_largest_score() -> None:
    first, second = stats([1.0, 2.0], 3.0, 0.5, 7.0), stats([2.0, 2.0], 4.0, 0.25, 6.0)
    (total,) = add_stats(add_stats([], [first]), [second])
    assert total.assignments.tolist() == [3.0, 4.0] and total.probability.tolist() == [2.0, 2.0]
    assert (total.tokens, total.entropy, total.largest) == (7.0, 0.75, 7.0)


def test_peak_memory_is_that_of_this_process_in_mb() -> None:
    before = peak_memory_mb(CPU)
    assert 50 < before < 100_000
    block = torch.ones(int(before + 100) * 2**20 // 4)
    assert peak_memory_mb(CPU) >= before + 90
    del block


def test_the_matrix_rate_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.RATE_SIZE, "cpu", 256)
    for seconds in (0.02, 0.0):  # 0: as after a process that was asleep in between
        monkeypatch.setattr(metrics, "RATE_SECONDS", seconds)
        assert 1e7 < matrix_rate(CPU, torch.float32) < 1e14


# the progress line

ROW = {
    "step": 70,
    "loss": 3.14159,
    "bits_per_byte": 1.6180,
    "lr": 2.5e-4,
    "tokens_per_second": 12345.6,
    "expert_load": [[0.5, 1.5], [0.25, 1.75]],
    "memory_mb": 2048.4,
}


def test_the_progress_line_says_all_there_is_to_know() -> None:
    line = progress_line(ROW, 200, 3725)
    for part in (
        "step 70/200",
        "35%",
        "loss 3.1416",
        "1.618 bits/byte",
        "lr 2.5e-04",
        "12,346 tok/s",
        "1:02:05 left",
        "experts 0.25-1.75",
        "2,048 MB",
    ):
        assert part in line
    assert "\n" not in line and len(line) < 140


def test_the_progress_line_tells_of_overflows_and_of_what_is_not_known_yet() -> None:
    line = progress_line({**ROW, "loss_scale": 32768.0, "skipped_steps": 3}, None, None)
    assert "scale 32768 | 3 skipped" in line
    assert line.startswith(f"step {ROW['step']} |") and "left" not in line and "%" not in line
    assert "scale" not in progress_line({**ROW, "loss_scale": 65536.0, "skipped_steps": 0}, 200, 3725)


def test_the_progress_line_of_a_dense_model_without_bytes() -> None:
    line = progress_line({**ROW, "expert_load": [], "bits_per_byte": None}, 200, 0)
    assert "experts" not in line and "bits" not in line and "0:00 left" in line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3599.7, "1:00:00"), (90_061, "25:01:01")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tables_are_aligned() -> None:
    assert table("title", [("a", "1"), ("long", "2")]) == ["title", "  a     1", "  long  2"]


def test_a_pipe_gets_plain_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    out = io.StringIO()
    line = progress_line(ROW, 200, 3725)
    with Progress(Console(file=out, width=40, soft_wrap=True, highlight=False)) as progress:
        progress.say("[bold]a message in brackets[/bold] :smile:")
        progress.show(line, lasting=False)
        progress.show("the last one", lasting=True)
    assert out.getvalue().splitlines() == ["[bold]a message in brackets[/bold] :smile:", line, "the last one"]
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_a_pipe_gets_no_more_than_a_line_now_and_then_but_every_lasting_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Progress(Console(file=out, soft_wrap=True)) as progress:
        for k in range(12):
            now[0] += 1
            progress.show(f"line {k}", lasting=k == 3)
    assert out.getvalue().split("\n") == ["line 0", "line 3", "line 8", ""]


def test_a_terminal_redraws_the_line_and_keeps_the_lasting_ones() -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=60, highlight=False, _environ={"TERM": "xterm"})
    with Progress(terminal) as progress:
        progress.show("first " + "x" * 100, lasting=False)
        progress.show("second", lasting=False)
        progress.show("lasting", lasting=True)
        progress.show("third", lasting=False)
    text = out.getvalue()
    assert all(word in text for word in ("first", "second", "lasting", "third"))
    between = text[text.index("first") : text.index("second")]
    assert between.count("\x1b[2K") == 3, "all rows of the wrapped line are erased and drawn again in their place"
    assert between.count("x") == 100, "wrapped to the width of the terminal, nothing cut"
    assert "lasting\n" in text.replace("\r", "")
    assert "third" not in text[text.rindex("\x1b[2K") :], "the last line is erased, and not drawn again"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is visible again"


def test_a_terminal_is_as_it_was_after_an_error() -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    with pytest.raises(RuntimeError), Progress(terminal) as progress:
        progress.show("line", lasting=False)
        raise RuntimeError
    assert out.getvalue().endswith("\x1b[?25h") or out.getvalue().count("\x1b[?25h") == 1


def test_peak_memory_is_that_of_this_process_and_not_of_the_one_that_started_it() -> None:
    """A notebook of gigabytes starts small runs."""
    code = "import torch; from moelet.metrics import peak_memory_mb; print(peak_memory_mb(torch.device('cpu')))"
    ballast = torch.ones(2**28)  # 1 GiB
    started = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(started.stdout) < 1024 < peak_memory_mb(ballast.device)
