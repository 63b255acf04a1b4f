"""Estimates for many cards: what they add up to, and that they say of a rank what real ranks have and send."""

import math

import pytest

from moelet.errors import UserError
from moelet.foresee.clusters import links, on_many, parted
from moelet.foresee.layouts import Link, Links, held, layouts, memory, rows_of, travel
from moelet.foresee.sizes import empty_model
from moelet.hparams import Hparams, make_hparams
from moelet.parallel.layout import Layout, Sizes
from moelet.parallel.ranks import Team

SLOW = Links(Link(1e6, 0.0), Link(1e3, 0.0))


def settings(**train: object) -> Hparams:
    model = {"d_model": 64, "d_ff": 128, "n_heads": 4, "n_layers": 2, "max_length": 32, "d_embed": 32}
    return make_hparams({"model": model, "train": {"train_steps": 1, "batch_size": 8, **train}})


@pytest.mark.parametrize(
    ("given", "cards", "many"),
    [
        (None, None, []),
        ("T4", "T4", []),
        ("8xT4", "T4", [(8, "T4")]),
        ("L4, 64 x H100", "L4", [(64, "H100")]),
        ("2XA100,4xa100", "A100", [(2, "A100"), (4, "A100")]),
    ],
)
def test_cards_and_numbers_of_them(given: str | None, cards: str | None, many: list[tuple[int, str]]) -> None:
    single, clusters = parted(given)
    assert (single, [(count, card.name) for count, card in clusters]) == (cards, many)


@pytest.mark.parametrize("given", ["0xT4", "8xT5", "99999999xT4"])
def test_what_is_no_number_of_cards(given: str) -> None:
    with pytest.raises(UserError, match="It must be"):
        parted(given)


def test_every_layout_is_there_once_and_fits_the_ranks() -> None:
    found = list(layouts(12, 8))
    assert len(set(found)) == len(found) and found[0] == Sizes(12, 1, 1)
    assert all(math.prod(sizes) == 12 and 8 % sizes.expert == 0 for sizes in found)
    assert Sizes(1, 3, 4) in found and Sizes(4, 1, 3) not in found


@pytest.mark.parametrize("sizes", [Sizes(2, 1, 2), Sizes(1, 2, 2), Sizes(1, 1, 4), Sizes(2, 2, 1)])
def test_a_rank_holds_what_the_layout_gives_it(sizes: Sizes) -> None:
    hparams = settings()
    model = empty_model(hparams.model, 100)
    layout = Layout(Team(1, 4), sizes)
    expected = {"dense": 0, "experts": 0}
    for name, parameter in model.named_parameters():
        part = layout.part(name, parameter.shape[0])
        numbers = (part.stop - part.start) * parameter.numel() // parameter.shape[0]
        expected["experts" if ".experts." in name else "dense"] += numbers
    here = held(hparams, model, sizes)
    assert here.experts == expected["experts"]
    assert here.dense == pytest.approx(expected["dense"], rel=0.02)  # what can't be divided evenly lies on the first
    assert here.state == pytest.approx(2 * (expected["experts"] + expected["dense"]), rel=0.02)


def test_what_travels() -> None:
    hparams = settings()
    model = empty_model(hparams.model, 100)
    count = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    data = travel(hparams, model, Sizes(2, 1, 1), 4, SLOW)
    assert data[:3] == (4 * count, 0, 0) and data.seconds == pytest.approx(4 * count / 1e6)
    shard = travel(hparams, model, Sizes(1, 2, 1), 4, SLOW)
    assert shard[:3] == (0, 3 * count * 4 // 2, 0)
    expert = travel(hparams, model, Sizes(1, 1, 2), 4, SLOW)
    routed = 4 * 32 * 2 * 2  # rows of this rank x context x top-2 x layers
    assert expert[:3] == (4 * (count - experts), 0, 4 * routed * 64 * 4 // 2)
    far = travel(hparams, model, Sizes(16, 1, 1), 4, SLOW)
    assert far.seconds == pytest.approx(far.gradients / 1e3)
    assert travel(hparams, model, Sizes(1, 1, 1), 4, SLOW) == (0, 0, 0, 0.0)


def test_memory_shrinks_with_what_is_divided() -> None:
    hparams = settings()
    model = empty_model(hparams.model, 100)
    plain, expert, eight = (memory(hparams, model, sizes, 1e6) for sizes in (Sizes(8), Sizes(4, 1, 2), Sizes(1, 8, 1)))
    count = sum(p.numel() for p in model.parameters())
    assert plain == pytest.approx(16 * count + 1e6)
    assert plain > expert and 16 * count / 8 < eight - 1e6 < 16 * count


def test_estimates_of_a_cluster() -> None:
    hparams = settings(batch_size=12)
    model = empty_model(hparams.model, 100)
    _, ((count, card),) = parted("8xT4")
    found = on_many(count, card, hparams, 100, model)
    assert found["rows_each"] == 2 and found["idle_share"] == pytest.approx(0.25)
    assert rows_of(hparams, Sizes(8)) == [2]
    assert [row["data"] * row["shard"] * row["expert"] for row in found["layouts"]] == [8] * len(list(layouts(8, 8)))
    rates = [row["tokens_per_second"] for row in found["layouts"] if row["fits"]]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0
    assert links(card).near.bytes_per_second < 15.8e9
    with pytest.raises(UserError, match="Set train.batch_size"):
        on_many(8, card, settings(batch_size="auto", global_batch_size=8), 100, model)
