"""The command line's verbs that come before a run: plan and doctor. They import what they need when they run, so that
--help is quick.
"""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moelet.errors import UserError
from moelet.storage.disk import check_writable, write_file, write_json

Settings = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The settings; default: hparams.json.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results here too.")]


def plan(
    file: Settings = None,
    hours: Annotated[float | None, typer.Option(metavar="H", help="Propose sizes that train in so many hours.")] = None,
    gpus: Annotated[
        str | None, typer.Option(metavar="NAME,8xNAME", help="Only these cards; with --hours, sizes for the first.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Of trying the run's first steps here; 0: don't.")] = 20.0,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the first proposal here.")] = None,
    changes: Changes = None,
    json_file: JsonFile = None,
) -> None:
    """Say what a run will cost before it starts: size, memory, speed, hours, here and on other cards."""
    import json

    from moelet.console import Progress
    from moelet.foresee.plan import Request
    from moelet.foresee.plan import plan as make

    check_writable(json_file)
    check_writable(out)
    if out is not None and hours is None:
        raise UserError("--out is where proposed settings go, and nothing is asked for. Give --hours as well.")
    with Progress() as progress:
        request = Request(file or Path("hparams.json"), changes or [], hours, gpus, seconds)
        found = make(request, progress, lambda block: print(block, flush=True))
    write_json(json_file, found)
    if out is not None:
        write_file(out, (json.dumps(found["proposals"][0]["settings"], indent=2) + "\n").encode())
        print(f"train   python -m moelet train {shlex.quote(str(out))}")


def doctor(file: Settings = None, changes: Changes = None, json_file: JsonFile = None) -> None:
    """Look for faults of this machine and installation in a minute; each line says ok or what to do."""
    from moelet.foresee.doctor import doctor as examine

    check_writable(json_file)
    found = examine(file, changes or [], print)
    write_json(json_file, found)
    if found["faults"]:
        raise typer.Exit(UserError.exit_code)
