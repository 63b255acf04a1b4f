"""`moelet doctor`: a minute's look at this machine and this installation, before hours are spent on a run.

Every check goes through the code that a run would go through, on a small model with all the parts of the settings. A
check that itself stops with an error is a fault as well.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moelet.foresee.checks_kernels import build, parity
from moelet.foresee.checks_machine import folder, hub, precision, text, versions
from moelet.foresee.checks_model import REPORTED, balance, causality, resume, start, tying
from moelet.foresee.patient import FAULT, Finding, Patient
from moelet.hparams import Hparams, read_or_default

Check = Callable[[Patient], Iterator[Finding]]
CHECKS: dict[str, Check] = {
    "versions": versions,
    "precision": precision,
    "kernels": build,
    "parity": parity,
    "causality": causality,
    "tying": tying,
    "first loss": start,
    "balance": balance,
    "resume": resume,
    "run folder": folder,
    "text": text,
    "hub": hub,
}
WIDTH = 27  # of the column of names
LONGEST = 300  # characters of an error that a check stopped with
SIGNS = {"ok": "ok", "note": "note", "fault": "FAULT"}


def examine(hparams: Hparams, names: Sequence[str] = tuple(CHECKS)) -> Iterator[Finding]:
    """Yield what the checks find, one after the other."""
    patient = Patient(hparams)
    for name in names:
        try:
            yield from CHECKS[name](patient)
        except Exception as error:  # whatever stops a check is what it found
            words = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
            yield Finding(name, FAULT, f"the check stopped with {words}", REPORTED)


def line(finding: Finding, width: int) -> str:
    """Return a finding as text: one line, and one for what to do."""
    first = f"{SIGNS[finding.state]:<5}  {finding.check:<{width}}  {finding.told}"
    return first if finding.remedy is None else f"{first}\n{'':<5}  {'':<{width}}  -> {finding.remedy}"


def summary(findings: Sequence[Finding], seconds: float) -> str:
    """Return the last line."""
    faults = sum(finding.state == FAULT for finding in findings)
    said = "no fault" if faults == 0 else f"{faults} fault{'s' if faults > 1 else ''}"
    return f"{said} in {len(findings)} findings, {seconds:.0f} s"


def doctor(file: Path | None, changes: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Examine, say each finding as it comes, and return all of them."""
    began, found = time.monotonic(), list[Finding]()
    hparams = read_or_default(file, changes)
    for finding in examine(hparams):
        found.append(finding)
        say(line(finding, WIDTH))
    seconds = time.monotonic() - began
    say(summary(found, seconds))
    faults = [finding.check for finding in found if finding.state == FAULT]
    return {"faults": faults, "findings": [finding._asdict() for finding in found], "seconds": seconds}
