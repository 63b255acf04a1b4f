"""The command line: one subcommand per verb, and how each kind of ending becomes an exit code.

0 done; 1 bug; 2 the command line; 75 temporary, run it again; 78 files or settings that don't fit; 129, 130 and 143
interrupted, once training has begun with everything saved. Commands import what they need when they run, so that
--help is quick.
"""

import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moelet.commands.export import export_run, import_folder, upcycle_run
from moelet.commands.foresee import doctor, plan
from moelet.commands.serve import serve_runs
from moelet.commands.settings import show_settings
from moelet.commands.tokenizer import tokenizer_app
from moelet.errors import DISK, Interrupted, TemporaryError, UserError, complain, printable
from moelet.parallel.started import started_rank
from moelet.stopping import ctrl_c_ends_imports, nothing_to_save
from moelet.storage.disk import check_writable, make_folder, write_json
from moelet.storage.lock import refuse_held

# typer may bring its own copy of click; its public names lead to the base class of whichever it uses
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Pretrain a small Mixture-of-Experts GPT on the hardware you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def _ending_with_the_reader() -> Iterator[None]:
    """End as every Unix tool does when the reader of a pipe goes away, as in `moelet generate ... | head`."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder that `moelet train` wrote.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results here too.")]
TextField = Annotated[str | None, typer.Option(help="The field of rows; default: the run's.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a setting; may be repeated.")
]


@app.command(epilog="Example: moelet train hparams.json --run runs/first --set optim.lr=0.001")
@nothing_to_save()
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
    track: Annotated[str | None, typer.Option(metavar="NAME", help="Show it in tensorboard, wandb or trackio.")] = None,
    changes: Changes = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on although settings or text are no longer the run's.")
    ] = False,
) -> None:
    """Pretrain a model; writes a run folder with checkpoints, metrics, a loss curve and a report."""
    if resume is not None and run is not None:
        raise typer.BadParameter("--run begins a run and --resume goes on with one: give one of them.")
    if started_rank() == 0:
        refuse_held(resume or run)  # in a fraction of the time that torch takes to load
    from moelet import train as training
    from moelet.allocator import keep_freed_memory
    from moelet.budget import parse_duration
    from moelet.console import Progress
    from moelet.follow import follow
    from moelet.hparams import read_hparams
    from moelet.parallel.orders import refusing
    from moelet.parallel.ranks import join, leave

    seconds = None if time_budget is None else parse_duration(time_budget)
    keep_freed_memory()
    progress, began = Progress(), time.monotonic()
    team = join()
    if not team.leads:
        raise typer.Exit(follow(team))
    changes = [*(changes or []), *([] if track is None else [f"train.track={track}"])]
    with refusing(team):
        if resume is not None and (file is None or training.is_run(resume)):
            given = (changes, progress, began, file, seconds, accept_changes, team)
            _train_and_report(resume, progress, lambda: training.resume(resume, *given))
        else:
            path = file or Path("hparams.json")
            hparams = read_hparams(path, changes + ([] if seconds is None else [f"train.time_budget={seconds}"]))
            folder = resume or run or Path(hparams.train.run or f"runs/{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
            _train_and_report(folder, progress, lambda: training.start(hparams, folder, progress, began, team))
    leave(team)


def _train_and_report(run: Path, progress: Any, work: Any) -> None:
    """Do `work`, and write the pictures of what there is to see, also when it was interrupted."""
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
        f'try   python -m moelet generate {shlex.quote(str(run))} --prompt "..."',
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
    print(f"train   python -m moelet train {shlex.quote(str(out / 'hparams.json'))}")
    write_json(json_file, {key: made[key] for key in ("items", "bytes", "tokens", "vocab_size")})


@app.command(epilog='Example: moelet generate runs/first --prompt "def main(" --temperature 0.7 --top-k 40')
@_ending_with_the_reader()
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
    from moelet.generate import Sampling, complete, stream_text
    from moelet.precision import choose_device
    from moelet.storage.checkpoint import load

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
@_ending_with_the_reader()
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(metavar="SRC", help="`embedded`, or a path, glob or folder; default: held-out text.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="About how many, in whole pieces of text; default: all of SRC.")
    ] = None,
    text_field: TextField = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="LIST", help="Score these too: .jsonl files, names of lm-eval's tasks.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task.")] = None,
    delimiter: Annotated[str, typer.Option(help="Between question and answer, in files; lm-eval's is a space.")] = " ",
    json_file: JsonFile = None,
) -> None:
    """Measure loss, perplexity, bits per byte and expert load on held-out text, or on any other; and score tasks."""
    from moelet import evaluate as evaluation
    from moelet.console import Progress, table
    from moelet.data import read_validation
    from moelet.harness import Subject, examine, told
    from moelet.hparams import with_text
    from moelet.precision import choose_device, choose_dtype
    from moelet.storage.checkpoint import load, load_run_settings

    check_writable(json_file)
    hparams, _ = load_run_settings(run)
    if data is not None:
        hparams = with_text(hparams, data, text_field, str(run))
    device = choose_device(hparams.train.device)
    model, tokenizer, _, step = load(run, device)
    dtype, scored = choose_dtype(hparams.train.precision, device), {}
    if tasks is not None:
        with Progress() as progress:
            subject = Subject(model, tokenizer, hparams.batch_size, dtype)
            scored = {"tasks": examine(subject, tasks, delimiter, limit, progress)}
    most = tokens or (hparams.train.eval_tokens if data is None else None)
    split = "validation" if data is None else "all"
    text = read_validation(hparams.data, tokenizer, hparams.model.max_length, hparams.batch_size, most, split)
    result = evaluation.evaluate(model, text, dtype)
    rows = [
        ("loss", f"{result.loss:.4f} nats per token"),
        ("perplexity", f"{result.perplexity:.2f}"),
        ("bits per byte", f"{result.bits_per_byte:.4f} (gzip -9: {text.gzip_bits_per_byte:.4f})"),
        ("text", f"{result.tokens:,} tokens, {result.bytes:,} bytes"),
        *((f"experts {i}", " ".join(f"{load:.2f}" for load in layer)) for i, layer in enumerate(result.expert_load)),
        *((Path(name).stem, told(figures)) for name, figures in scored.get("tasks", {}).items()),
    ]
    print("\n".join(table(f"{run} at step {step}", rows)))
    write_json(json_file, result._asdict() | scored)


@app.command(epilog="Example: moelet inspect runs/first --data src/ --data 'books/*.txt' --out experts.html")
def inspect(
    run: RunFolder,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC", help="As for evaluate; several are compared; default: held-out text."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of each text, about.")] = 65_536,
    ablation_tokens: Annotated[
        int, typer.Option(min=0, help="Of each text, read again without each expert in turn; 0: leave that out.")
    ] = 4096,
    text_field: TextField = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="Default: RUN/inspect.html.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Show what the experts do: load, which tokens go where, how far apart texts are, what each is worth."""
    from moelet.console import Progress
    from moelet.inspection import figures as inspection
    from moelet.inspection import page as inspection_page

    path = out or run / "inspect.html"
    check_writable(json_file)
    check_writable(path if run.is_dir() else out)  # what isn't a run is told as that
    with Progress() as progress:
        found = inspection.inspect(run, data or (), text_field, tokens, ablation_tokens, progress)
    print("\n".join([f"{run} at step {found['step']}", *(f"  {sentence}" for sentence in found["sentences"])]))
    print(f"see   {inspection_page.write(found, path)}")
    write_json(json_file, found)


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
    from moelet.console import Progress
    from moelet.speed import bench as benchmark
    from moelet.speed import page as bench_page

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
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Default: recipes/modern-cpu.json.")] = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The study's folder, new or not.")] = None,
    time_budget: Annotated[str | None, typer.Option(metavar="TIME", help="Choose a size that ends in it: 60m.")] = None,
    vary: Annotated[list[str] | None, typer.Option(metavar="K=A,B", help="Compare values; crossed.")] = None,
    arm: Annotated[list[str] | None, typer.Option(metavar="NAME: K=V K=V", help="Compare a change.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each arm; default: 3.")] = None,
    lr_grid: Annotated[str | None, typer.Option(metavar="X,Y", help="On learning rates; default: 0.5,1,2.")] = None,
    horizons: Annotated[str | None, typer.Option(metavar="X,Y", help="Of the tokens; default: 0.25,0.5,1.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: what is fastest.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="PLAN", help="Make the study of a plan.json anew.")] = None,
    changes: Changes = None,
    json_file: JsonFile = None,
) -> None:
    """Find out whether a mixture of experts pays, or what changes to the settings do."""
    from moelet.budget import parse_duration
    from moelet.console import Progress
    from moelet.study.planning import Request, numbers
    from moelet.study.prove import prove as carry_out

    check_writable(json_file)
    began = time.monotonic()
    budget = None if time_budget is None else parse_duration(time_budget)
    grid, shares = numbers("--lr-grid", lr_grid), numbers("--horizons", horizons)
    request = Request(file, changes or (), vary or (), arm or (), seeds, grid, shares, jobs, budget, plan)
    folder = run or Path(f"runs/prove-{time.strftime('%Y%m%d-%H%M%S')}")
    write_json(json_file, carry_out(request, folder, Progress(), began))


app.command("serve", epilog="Example: moelet serve runs/first runs/second")(serve_runs)
app.command("export", epilog="Example: moelet export runs/first --to hf --out first-hf")(export_run)
app.command("import", epilog="Example: moelet import first-hf --run runs/again --set optim.lr=0.0003")(import_folder)
app.command("upcycle", epilog="Example: moelet upcycle runs/dense --run runs/moe")(upcycle_run)
app.command("plan", epilog="Example: moelet plan recipes/modern-t4.json --gpus T4 --hours 5 --out my.json")(plan)
app.command("doctor", epilog="Example: moelet doctor recipes/modern-t4.json --json findings.json")(doctor)
app.command("settings", epilog="Example: moelet settings optim.lr")(show_settings)
app.add_typer(tokenizer_app, name="tokenizer", epilog="Example: moelet tokenizer train book.txt --out book.model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. A bug is not caught here: its traceback is what helps."""
    try:
        with ctrl_c_ends_imports():
            result = app(args=None if arguments is None else list(arguments), prog_name="moelet", standalone_mode=False)
        if result == 130:  # typer's answer to Ctrl-C; the training loop has an answer of its own
            complain("interrupted outside of training; run the same command again.")
        return result if isinstance(result, int) else 0
    except ClickException as error:
        error.show()
        return error.exit_code
    except (UserError, TemporaryError, Interrupted) as error:
        complain(str(error))
        return error.exit_code
    except (MemoryError, RuntimeError) as error:
        from moelet.memory import told

        complain(told(error))
        return UserError.exit_code
    except OSError as error:
        if error.errno in DISK:
            complain(f"the disk {DISK[error.errno]} ({error}). Then run the same command again.")
            return TemporaryError.exit_code
        if error.filename is None:
            raise
        complain(f"{error.filename} can't be used ({error.strerror}). Mend that.")
        return UserError.exit_code
