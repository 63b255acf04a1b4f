"""The command line's verbs that make one model of another: export, import, upcycle.

They import what they need when they run, so that --help is quick.
"""

import json
import re
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from moelet.errors import UserError
from moelet.storage.disk import check_writable, write_json


def export_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `moelet train` wrote.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A new folder (hf) or file (gguf).")],
    to: Annotated[str, typer.Option(help="hf: a folder for transformers. gguf: a file for llama.cpp and Ollama.")],
    code: Annotated[
        str | None,
        typer.Option(help="hf: whether a model file of ours goes along: auto (only where it must), never, always."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Contexts full of text to compare the model on.")] = 8,
    kind: Annotated[str | None, typer.Option("--type", help="gguf: f32, f16 (default) or q8_0.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results here too.")
    ] = None,
) -> None:
    """Write a run's model for transformers or llama.cpp, checked against the run by a process without moelet."""
    check_writable(json_file)
    if to not in ("hf", "gguf"):
        raise UserError(f"--to is '{to}'. It must be one of: hf, gguf.")
    if (code if to == "gguf" else kind) is not None:
        raise UserError(f"--{'code' if to == 'gguf' else 'type'} says nothing about --to {to}. Leave it out.")
    result = _export_hf(run, out, code or "auto", rows) if to == "hf" else _export_gguf(run, out, kind or "f16", rows)
    write_json(json_file, result)


def _export_hf(run: Path, out: Path, code: str, n_rows: int) -> dict[str, Any]:
    from moelet.console import table
    from moelet.export.hf import export_hf

    made = export_hf(run, out, code, n_rows)
    trust = ", trust_remote_code=True" if made.own_code else ""
    rows = [("model", f"{made.parity.name}, {made.parameters / 1e6:.1f}M parameters, of {run} at step {made.step}")]
    if made.own_code:
        rows.append(("code of ours", f"{' and '.join(made.own_code)}, to be trusted by whoever loads the folder"))
    rows += [("because", reason) for reason in made.reasons]
    rows += _checked(made.parity._asdict())
    print("\n".join(table(str(out), rows)))
    place = json.dumps(str(out), ensure_ascii=False)
    print(f"load  AutoModelForCausalLM.from_pretrained({place}{trust}), AutoTokenizer likewise")
    return _plain(made)


def _export_gguf(run: Path, out: Path, kind: str, n_rows: int) -> dict[str, Any]:
    from moelet.console import table
    from moelet.export.gguf import export_gguf, modelfile

    made = export_gguf(run, out, kind, n_rows)
    size = f"{made.bytes / 2**20:.1f} MiB, {kind}"
    rows = [("model", f"{made.parameters / 1e6:.1f}M parameters, {size}, of {run} at step {made.step}")]
    if made.parity is None:
        rows.append(
            ("checked", "what was written, bit for bit; with pip install llama-cpp-python also what it computes")
        )
    else:
        rows += _checked(made.parity._asdict())
    print("\n".join(table(str(out), rows)))
    print(f"for Ollama:\ncat > Modelfile <<'END'\n{modelfile(made)}\nEND")
    print(f"ollama create {ollama_name(out)} -f Modelfile")
    return _plain(made)


def ollama_name(path: Path) -> str:
    """Return the name of a file's model at Ollama: small letters, digits and what may stand between them."""
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower(), flags=re.ASCII).strip("-") or "moelet"


def _checked(parity: dict[str, Any]) -> list[tuple[str, str]]:
    every = parity["tokens"] == parity["of_tokens"]
    beyond = "" if every else f"; {parity['logits_of_all']:.1e} with those after a close choice of experts"
    return [
        ("checked", f"with {parity['software']}, on {parity['origin']}"),
        ("tokenizer", f"{parity['texts']:,} of {parity['texts']:,} texts have equal ids"),
        ("logits", f"at most {parity['logits']:.1e} apart on {parity['tokens']:,} tokens{beyond}"),
        ("loss", f"at most {parity['loss']:.1e} nats a token apart, on {parity['of_tokens']:,} tokens"),
        ("generation", f"{parity['same']} of {parity['prompts']} prompts go on as here, token for token"),
    ]


def _plain(made: Any) -> dict[str, Any]:
    """Return what was exported as JSON has it."""
    parity = None if made.parity is None else made.parity._asdict()
    return made._asdict() | {"path": str(made.path), "parity": parity}


def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A folder that `moelet export --to hf` wrote.")],
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="The new run's folder.")],
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The settings to train it with; its model is the folder's.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
) -> None:
    """Make a run of an exported folder, to evaluate it or to train it on. No code of the folder is run."""
    from moelet.console import table
    from moelet.export.importing import import_hf
    from moelet.hparams import DEFAULT_FILE

    made = import_hf(folder, run, file, changes or [])
    steps, defaults = made.hparams.total_steps, file is None and not DEFAULT_FILE.exists()
    rows = [
        ("weights", f"those of {folder}, {made.kind}, {made.parameters / 1e6:.1f}M parameters"),
        ("settings", f"the defaults, as there is no {DEFAULT_FILE} here: give FILE for others" if defaults
         else f"those of {file or DEFAULT_FILE}, the model's and tokenizer's are the folder's"),
        ("length", "a time budget" if steps is None else f"{steps:,} steps, with a schedule and optimizer of its own"),
    ]  # fmt: skip
    print("\n".join(table(str(run), rows)))
    print(f"train   python -m moelet train --resume {shlex.quote(str(run))}")


def upcycle_run(
    dense: Annotated[Path, typer.Argument(metavar="DENSE_RUN", help="A run folder whose model.n_experts is 1.")],
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="The new run's folder.")],
    experts: Annotated[int, typer.Option(help="Copies of each dense layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that each token uses.")] = 2,
    noise: Annotated[float, typer.Option(help="Added to each copy, relative to its matrix's spread.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the routers and the noise.")] = 0,
    continue_data: Annotated[
        bool, typer.Option("--continue-data", help="Read on where the dense run stood, not from the start.")
    ] = False,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
    ] = None,
) -> None:
    """Make a Mixture of Experts of a dense run: a new run that starts at its loss."""
    from moelet.console import table
    from moelet.upcycle import upcycle as make

    made = make(dense, run, experts, top_k, noise, seed, changes or [], continue_data)
    steps = made.hparams.total_steps
    rows = [
        ("weights", f"those of {dense} at step {made.step}, each dense layer {experts} times; noise {noise:g}"),
        ("parameters", f"{made.parameters / 1e6:.1f}M, of which a token uses {top_k} of {experts} experts; the dense "
         f"model's {made.dense_parameters / 1e6:.1f}M"),
        ("text", "from where the dense run stood" if continue_data else "from its start; --continue-data reads on"),
        ("length", "a time budget" if steps is None else f"{steps:,} steps, with a schedule and optimizer of its own"),
    ]  # fmt: skip
    print("\n".join(table(str(run), rows)))
    print(f"train   python -m moelet train --resume {shlex.quote(str(run))}")
