"""The scorecard of tests/faults: how often a fault was tried, how often the run survived it, how often not.

Each test there belongs to a check and counts trials:

    @pytest.mark.check(6)
    def test_two_runs_in_one_folder(trials: Trials, tmp_path: Path) -> None:
        "The second exits with 78 and says who is there; the first goes on."
        for index in range(trials.count(small=5, full=100)):
            with trials.one(f"race {index}"):
                ...

A trial is lost if anything in it fails; the rest are still made, and the test fails at its end. Every test is there
twice: at its small figure in the ordinary suite, at its full one with `-m nightly`. conftest.py takes the hooks.
"""

import platform
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class Check(NamedTuple):
    area: str
    fault: str
    target: str  # at full figures


CHECKS: dict[int, Check] = {}


def check(number: int, area: str, fault: str, target: str) -> None:
    CHECKS[number] = Check(area, fault, target)


check(1, "durability", "killed at any time", "0 of 250 lost")
check(2, "durability", "killed at every write; power cut", "no bad state of any prefix")
check(3, "durability", "disk full, over quota, broken, read-only", "0 lost at any write")
check(4, "durability", "corrupted checkpoints", "1,000 of 1,000 found before a tensor is used")
check(5, "durability", "SIGTERM, SIGINT, SIGUSR1", "60 of 60 saved, no hang over 10 s")
check(6, "durability", "two runs in one folder", "100 of 100 races with one winner")
check(7, "durability", "clocks that go back, leftovers, failing unlink", "0 wrong deletions in 500 cases")
check(8, "durability", "checkpoints of older formats", "all load or are refused by name")
check(9, "resume", "cut and resumed three times", "0 differing bytes")
check(10, "resume", "every document once, in order", "equal ordered ids at every cut")
check(11, "resume", "learning rate and counters over skipped steps", "1,000 of 1,000 equal the formula")
check(12, "resume", "changed identity", "12 of 12 refused with both fingerprints")
check(13, "ranks", "more and fewer ranks on the way", "equal rows; losses within 1e-5")
check(14, "data", "a hub that fails", "500 of 500 requests survived, no document lost or repeated")
check(15, "data", "bad rows, odd documents, bombs", "10,000 rows, 0 uncaught, 0 hangs")
check(16, "data", "a reader that dies or hangs", "30 of 30 found and restarted or saved")
check(17, "data", "any text through the tokenizer", "20,000 of 20,000 equal after the round trip")
check(18, "numerics", "the routed layer against float64", "200 shapes within tolerance")
check(19, "numerics", "loss under any split into micro-batches", "within 1e-6 (fp32), 1e-12 (fp64)")
check(20, "numerics", "the future and other documents", "100 of 100 bitwise unseen")
check(21, "numerics", "balance and z-loss", "equal the formula under any split")
check(22, "numerics", "NaN, infinity, fp16 overflow", "50 of 50: weights stay finite")
check(23, "numerics", "starved experts", "alarm each time, none in 3 healthy seeds")
check(24, "numerics", "the same run in new processes", "3 of 3 equal in hex")
check(25, "numerics", "the KV cache against the full forward pass", "200 prompts within 1e-5, equal greedy ids")
check(26, "numerics", "tied weights through save, load, resume", "one storage; no spike in the loss")
check(27, "numerics", "out of memory", "20 of 20: the same step in smaller parts")
check(28, "ranks", "any layout of ranks", "gradients, losses within 1e-5; checkpoints equal to the last bit")
check(29, "ranks", "a rank that dies, hangs or fails", "30 of 30 named, all ended within 30 s")
check(30, "security", "files that would run code", "0 of 50 canaries")
check(31, "security", "hostile files", "10,000 mutations: no signal, only UserError")
check(32, "serving", "hostile requests", "1,000: no 5xx, no leak")


class Trials:
    """Counts what one test tried and lost. `full`: at the figures of the scorecard."""

    def __init__(self, number: int, full: bool) -> None:
        self.number, self.full = number, full
        self.random = random.Random(number)
        self.tried = 0
        self.lost: list[str] = []

    def count(self, small: int, full: int) -> int:
        return full if self.full else small

    @contextmanager
    def one(self, what: str) -> Iterator[None]:
        """Make one trial; `what` names it where it is lost."""
        self.tried += 1
        try:
            yield
        except (Exception, pytest.fail.Exception, pytest.skip.Exception) as error:
            self.lost.append(f"{what}: {type(error).__name__}: {error}")


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    marker = request.node.get_closest_marker("check")
    assert marker, "a test that counts trials says of which check: @pytest.mark.check(number)"
    return Trials(marker.args[0], request.param == "full")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trials" in metafunc.fixturenames:
        scales = ["small", pytest.param("full", marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])]
        metafunc.parametrize("trials", scales, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    started = time.perf_counter()
    trials: Trials | None = pyfuncitem.funcargs.get("trials")
    whole = False
    try:
        result = yield
        whole = True
        return result
    finally:
        if trials:
            lost = len(trials.lost) if whole else max(1, len(trials.lost))
            seconds = time.perf_counter() - started
            pyfuncitem.user_properties.append(("trials", (trials.number, trials.full, trials.tried, lost, seconds)))
            if whole and (trials.lost or not trials.tried):
                listed = "\n".join(trials.lost[:10])
                pytest.fail(f"{len(trials.lost)} of {trials.tried} trials lost\n{listed}", pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--scorecard", metavar="FILE", help="write tests/faults' scorecard; a check not run counts as lost"
    )


def table(counts: dict[int, list[float]]) -> list[str]:
    lines = ["| check | fault | tried | survived | lost | s | target |", "|---|---|---|---|---|---|---|"]
    for number, check in CHECKS.items():
        tried, lost, seconds = counts.get(number, [0, 0, 0])
        figures = f"{tried:,} | {tried - lost:,} | {lost:,} | {seconds:.0f}" if tried else "not run | | all |"
        lines.append(f"| {number} | {check.fault} | {figures} | {check.target} |")
    return lines


def head() -> str:
    """Say when and where the card was made: date, commit, versions."""
    root = Path(__file__).resolve().parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return f"{date.today()}, commit {commit}, Python {platform.python_version()}, torch {torch.__version__}"


def _counts(terminalreporter: Any) -> dict[int, list[float]]:
    """Return, by check, the trials at full figures, those lost, and seconds: what the tests' reports say."""
    counts: dict[int, list[float]] = {}
    for report in [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]:
        for name, value in getattr(report, "user_properties", []):
            if name == "trials":
                number, full, tried, lost, seconds = value
                if full:
                    sums = counts.setdefault(number, [0, 0, 0])
                    counts[number] = [sums[0] + tried, sums[1] + lost, sums[2] + seconds]
    return counts


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = _counts(terminalreporter)
    if not counts:
        return
    lines = table(counts)
    for line in lines:
        terminalreporter.write_line(line)
    target = config.getoption("--scorecard")
    if target:
        total = f"{sum(tried for tried, _, _ in counts.values()):,} trials"
        intro = "`python -m pytest -m nightly tests/faults -n 2 --scorecard docs/scorecard.md`"
        text = ["# Scorecard", "", f"{intro}: {total}. {head()}.", "", *lines, ""]
        Path(target).write_text("\n".join(text), encoding="utf-8")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run that writes the card with a check missing: what was skipped is lost."""
    if not session.config.getoption("--scorecard"):
        return
    ran = _counts(session.config.pluginmanager.get_plugin("terminalreporter"))
    if set(CHECKS) - set(ran) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
