"""The command line: one subcommand per verb, and how each kind of ending becomes an exit code.

0 done; 1 bug; 2 the command line; 75 temporary, run it again; 78 files or settings that don't fit; 130 and 143
interrupted, once training has begun with everything saved. Commands import what they need when they run, so that
--help is quick.
"""

import errno
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moelet.disk import check_writable, make_folder, write_json
from moelet.errors import Interrupted, TemporaryError, UserError
from moelet.tokenizer_cli import tokenizer_app

# typer may bring its own copy of click; its public names lead to the base class of whichever it uses
ClickException: Any = typer.BadParameter.__mro__[2]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    help="Pretrain a small Mixture-of-Experts GPT on the hardware you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tokenizer_app, name="tokenizer", epilog="Example: moelet tokenizer train book.txt --out book.model")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `moelet train` wrote.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results here too.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
]


@app.command(epilog="Example: moelet train hparams.json --run runs/first --set optim.lr=0.001")
def train(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The settings; default: hparams.json.")] = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="A new run's folder.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Go on with this run; with FILE, begin it if need be."),
    ] = None,
    time_budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="End within this time from now, such as 5h or 90m, whatever fits."),
    ] = None,
    changes: Changes = None,
) -> None:
    """Pretrain a model; writes a run folder with checkpoints, metrics, a loss curve and a report."""
    if resume is not None and run is not None:
        raise typer.BadParameter("--run begins a run and --resume goes on with one: give one of them.")
    from moelet import train as training
    from moelet.allocator import keep_freed_memory
    from moelet.budget import parse_duration
    from moelet.console import Progress
    from moelet.hparams import read_hparams

    seconds = None if time_budget is None else parse_duration(time_budget)
    keep_freed_memory()
    progress, changes, began = Progress(), changes or [], time.monotonic()
    if resume is not None and (file is None or training.is_run(resume)):
        _train_and_report(resume, progress, lambda: training.resume(resume, changes, progress, began, file, seconds))
        return
    path = file or Path("hparams.json")
    hparams = read_hparams(path, changes + ([] if seconds is None else [f"train.time_budget={seconds}"]))
    folder = resume or run or Path(hparams.train.run or f"runs/{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    _train_and_report(folder, progress, lambda: training.start(hparams, folder, progress, began))


def _train_and_report(run: Path, progress: Any, work: Any) -> None:
    """Do `work`, and write the pictures of what there is to see, also when it was interrupted."""
    from moelet.console import printable
    from moelet.metrics import METRICS_FILE
    from moelet.report import read_metrics, write_loss_curve, write_report

    try:
        work()
    except Interrupted:
        if (run / METRICS_FILE).exists() and read_metrics(run):
            write_loss_curve(run)
            write_report(run)
        raise
    write_loss_curve(run)
    last = read_metrics(run)[-1]
    for share in last.get("mix", []):
        progress.say(
            f"mix: {share['documents']:.1%} of documents and {share['characters']:.1%} of characters from "
            f"{share['source']} (asked: {share['asked']:.1%})"
        )
    if last.get("sample"):
        progress.say("sample:", *(f"    {printable(line)}" for line in last["sample"].split("\n")[:16]))
    if "val_bits_per_byte" in last:
        progress.say(
            f"done in {last['seconds']:.0f} s of training: {last['tokens']:,} tokens, held-out "
            f"{last['val_bits_per_byte']:.3f} bits/byte (gzip -9 of the same bytes: {last['gzip_bits_per_byte']:.3f})"
        )
    progress.say(
        f"see   {write_report(run)} and {run / 'loss_curve.png'}",
        f'try   python -m moelet generate {run} --prompt "..."',
    )


@app.command(epilog="Example: moelet prepare recipes/own-text.json --out prepared --tokens 50000000")
def prepare(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The settings; default: hparams.json.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the text goes.")] = Path("prepared"),
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Training tokens to prepare; default: what the run of FILE needs.")
    ] = None,
    changes: Changes = None,
    json_file: JsonFile = None,
) -> None:
    """Encode a source once, for training to read instead of the source; goes on where it was interrupted."""
    from moelet.console import Progress, table
    from moelet.hparams import read_hparams
    from moelet.prepare import prepare as prepare_text

    check_writable(json_file)
    with Progress() as progress:
        made = prepare_text(read_hparams(file or Path("hparams.json"), changes or []), out, tokens, progress)
    rows = [
        ("documents and rows", f"{made['items']:,}"),
        ("text", f"{made['bytes']:,} bytes, {made['tokens']:,} tokens, vocabulary {made['vocab_size']}"),
        ("shards", f"{len(made['shards'])}"),
    ]
    print("\n".join(table(str(out), rows)))
    print(f"train   python -m moelet train {out / 'hparams.json'}")
    write_json(json_file, {key: made[key] for key in ("items", "bytes", "tokens", "vocab_size")})


@app.command(epilog="Example: moelet upcycle runs/dense --run runs/moe --experts 8 --set train.train_steps=500")
def upcycle(
    dense: Annotated[Path, typer.Argument(metavar="DENSE_RUN", help="A run folder whose model.n_experts is 1.")],
    run: Annotated[Path, typer.Option("--run", metavar="DIR", help="The new run's folder.")],
    experts: Annotated[int, typer.Option(help="Copies of each dense layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts that each token uses.")] = 2,
    noise: Annotated[float, typer.Option(help="Added to each copy, relative to its matrix's spread.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the routers and the noise.")] = 0,
    continue_data: Annotated[
        bool, typer.Option("--continue-data", help="Read on where the dense run stood, not from the start.")
    ] = False,
    changes: Changes = None,
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
    print(f"train   python -m moelet train --resume {run}")


@app.command(epilog='Example: moelet generate runs/first --prompt "def main(" --temperature 0.7 --top-k 40')
def generate(
    run: RunFolder,
    prompt: Annotated[list[str], typer.Option("--prompt", metavar="TEXT", help="Several make a batch.")],
    tokens: Annotated[int, typer.Option(min=1, help="The most new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest.")] = 50,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest that reach p; default: all.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="The same seed gives the same text.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Continue a text, streamed as it is made; stops at the end of the document."""
    from moelet.checkpoint import load
    from moelet.console import printable
    from moelet.generate import Sampling, complete, stream_text
    from moelet.precision import choose_device

    _end_quietly_with_the_reader()
    check_writable(json_file)
    sampling = Sampling(temperature, top_k, top_p, seed)
    sampling.check()
    model, tokenizer, _, _ = load(run, choose_device("auto"))
    tokenizer.encode_batch(prompt)  # an error in a prompt comes before its echo
    shown = printable if sys.stdout.isatty() else str
    if len(prompt) == 1:
        print(shown(prompt[0]), end="", flush=True)
        parts = []
        for part in stream_text(model, tokenizer, prompt[0], tokens, sampling):
            print(shown(part), end="", flush=True)
            parts.append(part)
        print()
        texts = ["".join(parts)]
    else:
        texts = complete(model, tokenizer, prompt, tokens, sampling)
        for start, text in zip(prompt, texts, strict=True):
            print(f"{shown(start)}{shown(text)}\n---")
    write_json(json_file, [{"prompt": start, "text": text} for start, text in zip(prompt, texts, strict=True)])


@app.command(epilog="Example: moelet evaluate runs/first --data 'other/*.txt' --json result.json")
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(metavar="SRC", help="`embedded`, or a path, glob or folder; default: held-out text.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="About how many, in whole pieces of text; default: all of SRC.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="The field of rows; default: the run's.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure loss, perplexity, bits per byte and expert load on held-out text, or on any other."""
    from moelet import evaluate as evaluation
    from moelet.checkpoint import load, load_run_settings
    from moelet.console import table
    from moelet.data import read_validation
    from moelet.hparams import make_hparams
    from moelet.precision import choose_device, choose_dtype

    _end_quietly_with_the_reader()
    check_writable(json_file)
    hparams, _ = load_run_settings(run)
    if data is not None:
        changed = hparams.model_dump(mode="json")
        changed["data"] |= {"source": "embedded"} if data == "embedded" else {"source": "files", "files": data}
        changed["data"] |= {"text_field": text_field or hparams.data.text_field}
        hparams = make_hparams(changed, str(run))
    device = choose_device(hparams.train.device)
    model, tokenizer, _, step = load(run, device)
    limit = tokens or (hparams.train.eval_tokens if data is None else None)
    split = "validation" if data is None else "all"
    text = read_validation(hparams.data, tokenizer, hparams.model.max_length, hparams.batch_size, limit, split)
    result = evaluation.evaluate(model, text, choose_dtype(hparams.train.precision, device))
    rows = [
        ("loss", f"{result.loss:.4f} nats per token"),
        ("perplexity", f"{result.perplexity:.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f} (gzip -9: {text.gzip_bits_per_byte:.4f})"),
        ("text", f"{result.tokens:,} tokens, {result.bytes:,} bytes"),
        *((f"experts {i}", " ".join(f"{load:.2f}" for load in layer)) for i, layer in enumerate(result.expert_load)),
    ]
    print("\n".join(table(f"{run} at step {step}", rows)))
    write_json(json_file, result._asdict())


@app.command(epilog="Example: moelet bench --variants naive-bf16,hf-mixtral-eager --rounds 3 --json bench.json")
def bench(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The settings; default: the reference shape."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each side, in turn with ours; the median counts.")] = 3,
    variants: Annotated[
        str | None, typer.Option(metavar="A,B,C", help="Whom to compare with, or `all`; default: a quick selection.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Sequences a step; default: the settings'.")] = None,
    peers_allocator: Annotated[
        str, typer.Option(metavar="WHICH", help="`default`: the system's, `same`: as ours, or `both`.")
    ] = "both",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write the page and a picture here.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure training and decoding against dense twins, plain code, transformers and the machine's own limits."""
    from moelet import bench as benchmark
    from moelet import bench_page
    from moelet.console import Progress

    check_writable(json_file)
    workload = benchmark.workload_of(file, batch_size)
    benchmark.choose(variants)
    make_folder(out)
    with Progress() as progress:
        result = benchmark.bench(workload, variants, peers_allocator, rounds, progress)
    print(bench_page.page(result))
    for path in [] if out is None else bench_page.write(result, out):
        print(f"see   {path}")
    write_json(json_file, result)


@app.command(epilog="Example: moelet prove hparams.json --time-budget 60m --run runs/does-it-pay")
def prove(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The settings; default: hparams.json.")] = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The study's folder, new or not.")] = None,
    time_budget: Annotated[str | None, typer.Option(metavar="TIME", help="Choose a size that ends in it: 60m.")] = None,
    vary: Annotated[list[str] | None, typer.Option(metavar="K=A,B", help="Compare values; crossed.")] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME: K=V K=V", help="Compare a change.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each arm; default: 3.")] = None,
    lr_grid: Annotated[str | None, typer.Option(metavar="X,Y", help="On learning rates; default: 0.5,1,2.")] = None,
    horizons: Annotated[str | None, typer.Option(metavar="X,Y", help="Of the tokens; default: 0.25,0.5,1.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time, sharing the threads; default: 1.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="PLAN", help="Make the study of a plan.json anew.")] = None,
    changes: Changes = None,
    json_file: JsonFile = None,
) -> None:
    """Find out whether a mixture of experts pays, or what changes to the settings do."""
    from moelet.budget import parse_duration
    from moelet.console import Progress
    from moelet.planning import Request, numbers
    from moelet.prove import prove as carry_out

    check_writable(json_file)
    began = time.monotonic()
    budget = None if time_budget is None else parse_duration(time_budget)
    grid, shares = numbers("--lr-grid", lr_grid), numbers("--horizons", horizons)
    request = Request(file, changes or (), vary or (), arm or (), seeds, grid, shares, jobs, budget, plan)
    folder = run or Path(f"runs/prove-{time.strftime('%Y%m%d-%H%M%S')}")
    write_json(json_file, carry_out(request, folder, Progress(), began))


def _end_quietly_with_the_reader() -> None:
    """End as every Unix tool does when the reader of a pipe goes away, as in `moelet generate ... | head`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. A bug is not caught here: its traceback is what helps."""
    try:
        result = app(args=None if arguments is None else list(arguments), prog_name="moelet", standalone_mode=False)
        if result == 130:  # typer's answer to Ctrl-C; the training loop has an answer of its own
            print("moelet: interrupted outside of training; run the same command again.", file=sys.stderr)
        return result if isinstance(result, int) else 0
    except ClickException as error:
        error.show()
        return error.exit_code
    except (UserError, TemporaryError, Interrupted) as error:
        print(f"moelet: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno in DISK_FULL:
            print(f"moelet: the disk is full ({error}). Make room and run the same command again.", file=sys.stderr)
            return TemporaryError.exit_code
        if error.filename is None:
            raise
        print(f"moelet: {error.filename} can't be used ({error.strerror}). Mend that.", file=sys.stderr)
        return UserError.exit_code
