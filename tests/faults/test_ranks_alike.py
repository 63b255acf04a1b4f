"""Several ranks make the run that one makes: gradients, losses, checkpoints, whatever the layout."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TinySettings
from crew import Crew, Ranks, ranks
from processes import rows as metrics_of
from scorecard import Trials
from torch import Tensor

from moelet.storage import checkpoint
from moelet.storage.manifest import folder_of
from moelet.storage.tensor_file import TensorFile, Tensors
from moelet.tokenizer import Tokenizer

ALONE = ranks()
FEW = [ranks(data=2), ranks(shard=2), ranks(expert=2), ranks(data=2, expert=2)]
ALL = [ALONE, *FEW, ranks(shard=2, expert=2), ranks(data=3), ranks(data=2, shard=2)]
STEPS, CONTEXT, LAYERS, TOP_K, ROWS = 20, 32, 2, 2, 6
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "reference": {"train": {"batch_size": ROWS}},
    "modern": {
        "model": {
            **{"positions": "rope", "qk_norm": True, "activation": "swiglu", "normalize_top_k": True},
            **{"shared_expert": 32, "selection_bias": True, "value_residual": True, "embed_residual": True},
            **{"smear": True, "bigram_rows": 50, "embed_norm": True, "tie_embeddings": False},
        },
        "data": {"mask_documents": True},
        "optim": {"optimizer": "muon", "muon_lr": 0.01, "muon_every": 2, "lr": 0.001, "min_lr": 0.0001},
        "balance": {"bias_rate": 0.001, "z_loss": 0.001},
        "train": {"batch_size": 4, "gradient_accumulation": 2},
    },
    "uneven": {"data": {"packing": False}, "train": {"batch_size": 5, "global_batch_size": 7}},
}
OVERFLOWING = {"train": {"batch_size": ROWS, "precision": "fp16"}}
CLOSE = 1e-5


class Made(NamedTuple):
    reports: list[list[dict[str, Any]]]  # of each rank, of each step
    gradients: dict[str, Tensor]  # of the first step, unclipped, of all ranks together
    held: list[dict[str, Any]]  # what of the experts is on each rank, and what it sent
    run: Path


Make = Callable[[str, Ranks], Made]


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    with Crew(tmp_path_factory.mktemp("crew") / "said") as crew:
        yield crew


@pytest.fixture(scope="module")
def tokenizer_file(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer.save(path)
    return path


@pytest.fixture(scope="module")
def made(
    crew: Crew, tiny_settings: TinySettings, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """`made(recipe, ranks)` makes STEPS steps, once for all tests."""
    known: dict[tuple[str, Ranks], Made] = {}

    def make(recipe: str, layout: Ranks) -> Made:
        if (recipe, layout) not in known:
            out = tmp_path_factory.mktemp("steps")
            changes = RECIPES.get(recipe, OVERFLOWING)
            changes = changes | {"model": {"dropout": 0.0, **changes.get("model", {})}}
            changes |= {"optim": {"lr": 0.002, "min_lr": 0.0002, **changes.get("optim", {})}}
            changes |= {"train": {**changes["train"], "train_steps": STEPS}}
            settings = tiny_settings(**changes, parallel=layout.settings)
            crew.run(layout.count, "steps", settings, tokenizer_file, STEPS, out)
            reports, held = (
                [json.loads((out / f"{name}-{rank}.json").read_text()) for rank in range(layout.count)]
                for name in ("reports", "held")
            )
            known[recipe, layout] = Made(reports, merged(out), held, out)
        return known[recipe, layout]

    return make


def merged(folder: Path) -> dict[str, Tensor]:
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in sorted(folder.glob("model.rank-*.safetensors"))]
        return Tensors([TensorFile(file, "gradients") for file in files]).read_all()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


@pytest.mark.check(28)
def test_ranks_make_the_steps_that_one_makes(trials: Trials, made: Make) -> None:
    """Each parameter's gradient, the clip norm and twenty losses are those of one process, whatever the layout; all
    ranks decide alike, to the last bit."""
    tried = [(recipe, layout) for recipe in RECIPES for layout in ALL[1:]]
    few = [("reference", layout) for layout in FEW] + [("modern", FEW[1]), ("modern", FEW[2]), ("uneven", FEW[3])]
    for recipe, layout in tried if trials.full else few:
        with trials.one(f"{recipe}, {layout}"):
            alone, here = made(recipe, ALONE), made(recipe, layout)
            assert here.gradients.keys() == alone.gradients.keys()
            far = {name: distance(here.gradients[name], gradient) for name, gradient in alone.gradients.items()}
            assert max(far.values()) < CLOSE, far
            for report, expected in zip(here.reports[0], alone.reports[0], strict=True):
                assert report["loss"] == pytest.approx(expected["loss"], rel=CLOSE)
                assert (report["tokens"], report["bytes"]) == (expected["tokens"], expected["bytes"])
            first, expected = here.reports[0][0], alone.reports[0][0]
            assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=CLOSE)
            assert all(others == here.reports[0] for others in here.reports[1:])


@pytest.mark.check(28)
def test_fp16_steps_that_overflow_on_some_ranks(trials: Trials, made: Make) -> None:
    """All ranks pass the same steps over and keep the same loss scale, also where one alone has seen the overflow."""
    for layout in ALL[1:6] if trials.full else FEW[1:3]:
        with trials.one(str(layout)):
            first, *others = made("overflowing", layout).reports
            assert 3 < sum(report["skipped"] for report in first) < STEPS - 3
            assert all(reports == first for reports in others)
            scales = {rank["scale"] for rank in made("overflowing", layout).held}
            assert len(scales) == 1


@pytest.mark.check(28)
def test_experts_are_divided(trials: Trials, made: Make) -> None:
    """A rank has its share of the experts and of their optimizer's state, and sends rows for the others alone."""
    trials.count(small=2, full=2)
    for layout in (ranks(expert=2), ranks(data=2, expert=2)):
        with trials.one(str(layout)):
            (alone,), here = made("reference", ALONE).held, made("reference", layout).held
            for rank in here:
                assert (2 * rank["experts"], 2 * rank["state"]) == (alone["experts"], alone["state"])
            sent = sum(sum(rank["sent"]) for rank in here)
            routed = STEPS * ROWS * CONTEXT * TOP_K * LAYERS
            assert 0.3 * routed < sent < 0.7 * routed  # half of them, where routers have no preference


@pytest.mark.check(28)
def test_a_checkpoint_of_any_layout_is_read_in_any(
    trials: Trials, crew: Crew, tokenizer_file: Path, made: Make, tmp_path: Path
) -> None:
    """Written by one layout of ranks, put back in another, saved again: equal to the last bit, the optimizer's state
    included."""
    pairs = [(recipe, a, b) for recipe in ("reference", "modern") for a in ALL[:6] for b in ALL[:6] if a != b]
    one, data, shard, expert, both = ALL[:5]
    few = [("reference", expert, shard), ("reference", shard, one), ("modern", shard, expert), ("modern", one, both)]
    few += [("reference", data, expert), ("reference", both, data)]
    for number, (recipe, written, read) in enumerate(pairs if trials.full else few):
        with trials.one(f"{recipe}: {written}, then {read}"):
            run, again = made(recipe, written).run, tmp_path / str(number)
            settings = json.loads((run / "hparams.json").read_text()) | {"parallel": read.settings}
            again.mkdir()
            crew.run(read.count, "reload", settings, tokenizer_file, run, STEPS, again)
            saved, found = checkpoint.read(run, STEPS), checkpoint.read(again, STEPS)
            for tensors, expected in ((found.model, saved.model), (found.optimizer, saved.optimizer)):
                assert tensors.keys() == expected.keys()
                assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
            assert found.state == saved.state


@pytest.mark.check(13)
def test_a_run_goes_on_with_more_and_fewer_ranks(
    trials: Trials, crew: Crew, tiny_settings: TinySettings, tmp_path: Path
) -> None:
    """The rows of each step are the same, its losses within 1e-5: a run may be taken up by another number of ranks."""
    plain = {"model": {"dropout": 0.0}, "optim": {"lr": 0.002, "min_lr": 0.0002}}
    length = {"train_steps": STEPS, "checkpoint_steps": 5, "eval_steps": 5, "keep_checkpoints": 9}
    (tmp_path / "s.json").write_text(json.dumps(tiny_settings(**plain, train=length)))
    alone = tmp_path / "alone"
    crew.train(1, tmp_path / "s.json", "--run", alone)
    ways = [[ALL[2], ALL[4], ALONE], [ALL[1], ALONE, ALL[3]], [ALL[6], ALL[5], ALL[2]], [ALL[7], ALL[1], ALL[4]]]
    for number, way in enumerate(ways[: trials.count(small=1, full=4)]):
        with trials.one(", ".join(map(str, way))):
            run = tmp_path / f"elastic-{number}"
            shutil.copytree(alone, run)
            for layout, step in zip(way, (5, 10, 15), strict=True):
                for later in range(step + 1, STEPS + 1):  # as if the run had been cut there
                    shutil.rmtree(folder_of(run, later), ignore_errors=True)
                crew.train(layout.count, "--resume", run, *layout.changes)
            found, expected = metrics_of(run), metrics_of(alone)
            assert [row["step"] for row in found] == [row["step"] for row in expected]
            for row, other in zip(found, expected, strict=True):
                assert row["tokens"] == other["tokens"]
                for name in ("loss", "balance_loss", *(["val_loss"] if "val_loss" in other else [])):
                    assert row[name] == pytest.approx(other[name], rel=CLOSE), (row["step"], name)
            assert checkpoint.read(run, STEPS).state["cursor"] == checkpoint.read(alone, STEPS).state["cursor"]
