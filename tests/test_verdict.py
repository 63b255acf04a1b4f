"""What a study's figures say: hand-made numbers, and that chance is never called a win."""

import math
import random

import pytest

from moelet.study.verdict import (
    BETTER,
    TIE,
    WORSE,
    Arm,
    Crossing,
    compare,
    crossing,
    outcome,
    sentence,
    spread,
    verdict,
)

WINS = ("reaches", "better", "faster", "pays", "beats", "wins", "ahead")


def arm(name: str, *curves: list[tuple[int, float]], rate: float = 1000.0) -> Arm:
    return Arm(name, dict(enumerate(curves)), rate)


def test_a_crossing_is_read_off_in_the_logarithm_of_tokens() -> None:
    assert crossing([(100, 3.0), (400, 2.0)], 2.5, 400) == pytest.approx((0.5, ""))  # half way from 100 to 400 is 200
    assert crossing([(400, 2.0), (100, 3.0)], 2.0, 400) == pytest.approx((1.0, ""))
    assert crossing([(100, 3.0), (200, 2.5), (400, 2.0)], 2.25, 400).share == pytest.approx(math.sqrt(0.5))


def test_nothing_is_extrapolated() -> None:
    curve = [(100, 3.0), (400, 2.0)]
    assert crossing(curve, 3.5, 400) == (0.25, "<")
    assert crossing(curve, 3.0, 400) == (0.25, "")
    assert crossing(curve, 1.999, 400) == (1.0, ">")


def test_the_first_of_several_crossings_counts() -> None:
    assert crossing([(100, 3.0), (200, 2.0), (400, 2.2), (800, 1.9)], 2.1, 800).share < 200 / 800


def test_the_interval_is_students() -> None:
    found = outcome(1.0, [-0.01, -0.02, -0.03])
    assert found.mean == pytest.approx(-0.02)
    assert found.half_width == pytest.approx(4.303 * 0.01 / math.sqrt(3))
    assert found.word == TIE
    assert outcome(1.0, [-0.019, -0.02, -0.021]).word == BETTER
    assert outcome(1.0, [0.019, 0.02, 0.021]).word == WORSE


@pytest.mark.parametrize("difference", [-5.0, 0.0, 5.0])
def test_a_single_seed_is_a_tie(difference: float) -> None:
    found = compare(arm("moe", [(100, 9.0), (200, 2.0 + difference)]), arm("dense", [(100, 9.0), (200, 2.0)]))
    assert found.word == TIE
    assert "tie" in sentence(found) and "a single seed can't tell" in sentence(found)
    assert not any(word in sentence(found) for word in WINS)


def test_a_tie_is_never_worded_as_a_win() -> None:
    draw = random.Random(0)
    words = set()
    for _ in range(300):
        curves = [[[(100, draw.gauss(3, 0.1)), (200, draw.gauss(2, 0.1))] for _ in range(3)] for _ in "ab"]
        found = compare(arm("moe", *curves[0]), arm("dense", *curves[1]))
        words.add(found.word)
        assert ("tie" in sentence(found)) == (found.word == TIE)
        if found.word == TIE:
            assert not any(word in sentence(found) for word in WINS)
    assert words == {TIE, BETTER, WORSE}  # chance alone, once in twenty: the interval is of 95 %


def shifted(by: float) -> list[list[tuple[int, float]]]:
    """Three seeds of a curve that falls by 0.5 with each doubling, moved down by `by`, with a little noise."""
    return [[(100, 3.0 - by + n), (200, 2.5 - by + n), (400, 2.0 - by + n)] for n in (0.0, 0.001, -0.001)]


def test_a_win_is_given_in_tokens_and_in_time() -> None:
    found = compare(arm("moe", *shifted(0.5), rate=500.0), arm("dense", *shifted(0.0), rate=1000.0))
    assert found.word == BETTER and found.leader == "moe"
    assert [share.share for share in found.tokens] == pytest.approx([0.5] * 3)
    assert [share.share for share in found.seconds] == pytest.approx([1.0] * 3)
    assert found.seconds_per_token == 2.0
    assert "moe reaches the final loss of dense in 0.50 of its tokens" in sentence(found)


def test_slower_than_it_learns_is_said_with_but() -> None:
    found = compare(arm("moe", *shifted(0.25), rate=500.0), arm("dense", *shifted(0.0), rate=1000.0))
    assert "but 1.41" in sentence(found)


def test_a_loss_is_told_from_the_other_side() -> None:
    found = compare(arm("moe", *shifted(0.0), rate=500.0), arm("dense", *shifted(0.5), rate=1000.0))
    assert found.word == WORSE and found.leader == "dense"
    assert sentence(found).startswith("moe does not reach the final loss of dense: dense reaches")
    assert [share.share for share in found.factor(found.tokens)] == pytest.approx([2.0] * 3)
    assert [share.share for share in found.factor(found.seconds)] == pytest.approx([4.0] * 3)


def test_a_win_beyond_the_shortest_run_is_a_bound() -> None:
    found = compare(arm("moe", *shifted(2.0)), arm("dense", *shifted(0.0)))
    assert [share.bound for share in found.tokens] == ["<"] * 3
    assert "in <0.25 of its tokens" in sentence(found)
    back = compare(arm("dense", *shifted(0.0)), arm("moe", *shifted(2.0)))
    assert spread(back.factor(back.tokens)) == ">4.00"


def test_seeds_are_paired_and_only_what_both_have_counts() -> None:
    one = Arm("a", {0: [(1, 5.0), (2, 4.0)], 1: [(1, 5.0), (2, 4.1)], 2: [(1, 1.0)]}, 1.0)
    other = Arm("b", {0: [(2, 4.1)], 1: [(2, 4.2)]}, 1.0)
    found = compare(one, other)
    assert [h.tokens for h in found.horizons] == [2]
    assert found.horizons[0].differences == pytest.approx([-0.1, -0.1])


def test_spread_keeps_bounds() -> None:
    assert spread([Crossing(0.5)]) == "0.50"
    assert spread([Crossing(0.4), Crossing(0.6)]) == "0.50 (0.40 to 0.60)"
    assert spread([Crossing(0.25, "<"), Crossing(0.75)]) == "<0.50 (<0.25 to 0.75)"
    assert spread([Crossing(0.25, "<"), Crossing(1.0, ">")]) == "<0.25 to >1.00"


def test_the_verdict_holds_every_comparison() -> None:
    moe = arm("moe", *shifted(0.5))
    text = verdict([compare(moe, arm("one", *shifted(0.0))), compare(moe, arm("two", *shifted(0.5)))])
    assert "final loss of one" in text and "moe and two tie" in text
