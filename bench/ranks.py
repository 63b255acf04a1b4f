"""Several ranks against one process on this machine: tokens a second, what travels, and what the model of layouts says.

Each side is `--steps` steps of the reference job in processes of its own, the sides in turn, `--rounds` times; the
first two steps of each don't count. Compute is measured by as many processes that don't talk to one another, the link
by sums and exchanges alone. From the repository's root, on an idle machine:

    PYTHONPATH=. python bench/ranks.py --rounds 3 --out bench/results/ranks.md
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moelet.foresee.layouts import Link, Links, rows_of, travel
from moelet.foresee.sizes import empty_model
from moelet.hparams import Hparams, read_hparams
from moelet.parallel.layout import Sizes
from moelet.parallel.ranks import join, leave
from moelet.parallel.rows import deal, shares
from moelet.precision import choose_device, choose_dtype
from moelet.speed.peers import AnyIds, Workload, zipf_batches
from moelet.state import build
from moelet.step import train_step

SIDES = [Sizes(1, 1, 1), Sizes(2, 1, 1), Sizes(1, 2, 1), Sizes(1, 1, 2), Sizes(4, 1, 1), Sizes(2, 1, 2), Sizes(1, 1, 4)]
UNCOUNTED = 2
SENT = {"sum": 64 * 2**20, "exchange": 16 * 2**20}  # bytes of a message by which the link is measured
TRIES = 7


def settings(sizes: Sizes, rows: int, apart: bool) -> Hparams:
    """Return the reference job; `apart`: one rank's part of it, alone."""
    changes = [f"train.batch_size={rows}", "model.dropout=0", "train.gradient_accumulation=1"]
    if not apart:
        changes += [f"parallel.{name}={size}" for name, size in sizes._asdict().items()]
    return read_hparams("recipes/zyda2-t4.json", changes)


def work(order: dict[str, Any]) -> dict[str, Any] | None:
    """Be one rank of a side; the leader returns what was measured."""
    hparams = settings(Sizes(*order["sizes"]), order["rows"], order["apart"])
    if order["apart"]:
        torch.set_num_threads(order["threads"])
        os.environ["WORLD_SIZE"] = "1"
    team = join()
    if order["link"]:
        return link(team.size)
    training = build(hparams, AnyIds(order["vocab"]), team)
    batches, length = zipf_batches(Workload(hparams, order["vocab"])), hparams.model.max_length
    seconds, tokens = [], 0
    for _ in range(order["steps"] + UNCOUNTED):
        batch = [next(batches)]
        began = time.perf_counter()
        hand = deal(team, batch if team.leads else None, shares(batch, team.size), length)
        tokens = train_step(training, hand).tokens
        seconds.append(time.perf_counter() - began)
    sent = sum(m.exchange.rows_sent for m in training.model.modules() if getattr(m, "exchange", None) is not None)
    (sent,) = team.total(sent)
    leave(team)
    return {"seconds": seconds[UNCOUNTED:], "tokens": tokens, "rows_sent": sent / len(seconds)} if team.leads else None


def link(ranks: int) -> dict[str, Any]:
    """Return how many bytes a second each rank sends while all add up numbers, and while all exchange rows."""
    found: dict[str, Any] = {}
    numbers = torch.zeros(SENT["sum"] // 4)
    rows, arrived = torch.zeros(SENT["exchange"] // 4), torch.empty(SENT["exchange"] // 4)
    small = torch.zeros(8)
    for name, call, count in (
        ("sum", lambda: dist.all_reduce(numbers), 2 * (ranks - 1) / ranks * SENT["sum"]),
        ("exchange", lambda: dist.all_to_all_single(arrived, rows), (ranks - 1) / ranks * SENT["exchange"]),
        ("message", lambda: dist.all_reduce(small), 1.0),
    ):
        taken = []
        for _ in range(TRIES):
            dist.barrier()
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
        median = statistics.median(taken)
        found[name] = median / (2 * (ranks - 1)) if name == "message" else count / median
    return found


def run(ranks: int, **order: Any) -> dict[str, Any]:
    """Start the ranks of a side, wait for them, return what the leader says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, __file__, "--order", json.dumps(order)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    answers: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=32, help="of a step, over all ranks")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--order", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.order is not None:
        print(json.dumps(work(json.loads(options.order))))
        return
    given = {"vocab": options.vocab, "steps": options.steps, "rows": options.rows}
    cores = len(os.sched_getaffinity(0))
    nothing = {"link": False, "apart": False, "threads": 1}
    taken: dict[Sizes, list[float]] = {sizes: [] for sizes in SIDES}
    computed: dict[int, list[float]] = {2: [], 4: []}
    rows_sent: dict[Sizes, float] = {}
    tokens = 0
    for _ in range(options.rounds):
        for sizes in SIDES:
            ranks = sizes.data * sizes.shard * sizes.expert
            found = run(ranks, **{**given, **nothing, "sizes": sizes})
            taken[sizes] += found["seconds"]
            rows_sent[sizes], tokens = found["rows_sent"], found["tokens"]
        for ranks in computed:
            part = {"rows": options.rows // ranks, "apart": True}
            computed[ranks] += run(ranks, **{**given, **nothing, **part, "sizes": SIDES[0]})["seconds"]
    links = {n: run(n, **{**given, **nothing, "link": True, "sizes": SIDES[0]}) for n in computed}
    text = page(options, cores, tokens, taken, computed, links, rows_sent)
    print(text)
    if options.out is not None:
        options.out.write_text(text)


def page(
    options: argparse.Namespace,
    cores: int,
    tokens: int,
    taken: dict[Sizes, list[float]],
    computed: dict[int, list[float]],
    links: dict[int, dict[str, Any]],
    rows_sent: dict[Sizes, float],
) -> str:
    """Return the results as Markdown."""
    dtype = choose_dtype("auto", choose_device("cpu"))
    one = statistics.median(taken[SIDES[0]])
    lines = [
        "| ranks | tokens/s | of one process | foreseen, s a step | measured | off by | rows sent, of the formula |",
        "|---|---|---|---|---|---|---|",
    ]
    for sizes, seconds in taken.items():
        ranks, median = sizes.data * sizes.shard * sizes.expert, statistics.median(seconds)
        name = ", ".join(f"{key} {value}" for key, value in sizes._asdict().items())
        name = name if ranks > 1 else f"one process, {cores} threads"
        cells = [name, f"{tokens / median:,.0f}", f"{one / median:.2f}"]
        if ranks == 1:
            cells += ["", f"{median:.2f}", "", ""]
        else:
            hparams = settings(sizes, options.rows, False)
            rates = links[ranks]
            near = Link(rates["exchange"] if sizes.expert > 1 else rates["sum"], rates["message"])
            model = empty_model(hparams.model, options.vocab)
            way = travel(hparams, model, sizes, dtype.itemsize, Links(near, near))
            foreseen = statistics.median(computed[ranks]) + way.seconds
            s = hparams.model
            routed = ranks * sum(rows_of(hparams, sizes)) * s.max_length * s.top_k * s.n_layers
            formula = routed * (sizes.expert - 1) / sizes.expert
            share = f"{rows_sent[sizes] / formula:.2f}" if formula else ""
            cells += [f"{foreseen:.2f}", f"{median:.2f}", f"{foreseen / median - 1:+.0%}", share]
        lines.append(f"| {' | '.join(cells)} |")
    measured = ", ".join(
        f"{n} ranks: sums {rates['sum'] / 1e9:.2f} GB/s, exchanges {rates['exchange'] / 1e9:.2f} GB/s, "
        f"{rates['message'] * 1e6:.0f} us a message"
        for n, rates in links.items()
    )
    apart = ", ".join(f"{n} apart: {statistics.median(seconds):.2f} s" for n, seconds in computed.items())
    head = (
        f"Reference job, {options.rows} x 512 a step, {options.vocab:,} pieces, {str(dtype).removeprefix('torch.')}, "
        f"{cores} cores, torch {torch.__version__}; median of {options.rounds} x {options.steps} steps in turn.\n"
        f"Links by gloo: {measured}. Computing one rank's rows without the others: {apart}."
    )
    return "\n".join(["# Several ranks on one machine", "", head, "", *lines, ""])


if __name__ == "__main__":
    main()
