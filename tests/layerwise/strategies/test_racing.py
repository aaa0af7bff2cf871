"""Racing: beaten lanes, and the windows after which they are determined."""

import random

import pytest

from layerwise.scoring.perplexity import DIVERGED
from layerwise.strategies import racing
from layerwise.strategies.racing import beaten, rounds


def windows_of(*differences: float) -> list[float]:
    """Return losses that differ by this much from those of ``BASE``."""
    return [base + difference for base, difference in zip(BASE, differences, strict=False)]


@pytest.fixture
def keep_one(monkeypatch):
    """Let every lane but the best one be beaten."""
    monkeypatch.setattr(racing, "KEPT", 1)


BASE = [3.0, 2.5, 3.5, 2.0, 4.0, 3.25, 2.75, 3.0, 2.25, 3.75]


@pytest.mark.usefixtures("keep_one")
def test_a_lane_with_a_paired_t_above_4_is_beaten_even_if_windows_differ(monkeypatch):
    # Both are 1 worse on average; standard errors (1 / 3) ** .5 / 2 = .289 and (.04 / 3) ** .5 / 2 = .058.
    # That is a t of 3.46 and of 17.3.
    uneven = {"best": windows_of(0, 0, 0, 0), "second": windows_of(0.5, 1.5, 0.5, 1.5)}
    assert beaten(uneven) == set()
    assert beaten({"best": BASE[:4], "close": windows_of(0.9, 1.1, 0.9, 1.1)}) == {"close"}
    monkeypatch.setattr(racing, "T_BOUND", 3.4)
    assert beaten(uneven) == {"second"}


def test_the_two_best_are_never_beaten(monkeypatch):
    lanes = {0: windows_of(0, 0, 0), 1: windows_of(5, 6, 5), 2: windows_of(9, 8, 9), 3: windows_of(7, 7.5, 7)}
    assert beaten(lanes) == {2, 3}
    assert beaten({0: BASE}) == beaten({}) == set()
    for kept, expected in ((1, {1, 2, 3}), (4, set())):
        monkeypatch.setattr(racing, "KEPT", kept)
        assert beaten(lanes) == expected


@pytest.mark.usefixtures("keep_one")
def test_a_constant_difference_is_certain_on_several_windows_and_uncertain_on_one():
    assert beaten({0: [1.0, 2.0], 1: [1.5, 2.5]}) == {1}
    assert beaten({0: [1.0], 1: [1.5]}) == set()


@pytest.mark.usefixtures("keep_one")
def test_equal_lanes_do_not_beat_each_other():
    assert beaten({lane: BASE for lane in range(5)}) == set()


@pytest.mark.usefixtures("keep_one")
def test_a_lane_that_diverged_on_one_window_is_beaten_although_its_t_is_small():
    diverged = [*windows_of(*[-0.1] * 9), DIVERGED]
    assert beaten({"best": BASE, "diverged": diverged}) == {"diverged"}


@pytest.mark.usefixtures("keep_one")
def test_if_all_lanes_diverged_on_equally_many_windows_the_others_decide():
    lanes = {0: [DIVERGED, 3.0, 3.0, 3.0], 1: [DIVERGED, 3.1, 3.3, 2.9], 2: [DIVERGED, DIVERGED, 3.0, 3.0]}
    assert beaten(lanes) == {2}


@pytest.mark.usefixtures("keep_one")
def test_a_lane_that_is_worse_on_each_of_eight_windows_is_beaten_although_its_t_is_small():
    falling_apart = windows_of(0.1, 0.2, 0.1, 50.0, 0.3, 0.1, 0.2, 0.1)
    assert beaten({"best": BASE[:8], "worse": falling_apart}) == {"worse"}
    assert beaten({"best": BASE[:7], "worse": falling_apart[:7]}) == set()
    falling_apart[2] = BASE[2] - 0.1
    assert beaten({"best": BASE[:8], "worse": falling_apart}) == set()


def test_lanes_of_equal_quality_are_rarely_beaten():
    dice, wrong = random.Random(0), 0
    for _ in range(300):
        levels = [dice.gauss(3, 0.4) for _ in range(16)]
        lanes = {lane: [level + dice.gauss(0, 0.05) for level in levels] for lane in range(4)}
        wrong += len(beaten(lanes))
    assert wrong <= 6  # 1 % of the 600 that could be


def test_a_plan_that_is_much_worse_is_beaten_in_the_first_round():
    dice = random.Random(1)
    for _ in range(100):
        levels = [dice.gauss(3, 0.4) for _ in range(8)]
        lanes = {lane: [level + 0.2 * lane + dice.gauss(0, 0.05) for level in levels] for lane in range(5)}
        assert beaten(lanes) == {2, 3, 4}


def test_lanes_with_different_numbers_of_windows_are_refused():
    with pytest.raises(ValueError, match=r"losses are \{0: 2, 1: 1\}\. Cut them"):
        beaten({0: [1.0, 2.0], 1: [1.0]})
    with pytest.raises(ValueError, match=r"losses are \{0: 0\}"):
        beaten({0: []})


@pytest.mark.parametrize(
    "windows, lengths",
    [
        (64, [8, 8, 16, 32]),
        (128, [8, 8, 16, 32, 64]),
        (16, [8, 8]),
        (24, [8, 16]),
        (31, [8, 23]),
        (8, [8]),
        (3, [3]),
    ],
)
def test_rounds_double_the_windows_and_the_last_round_takes_the_rest(windows, lengths):
    assert [len(part) for part in rounds(windows)] == lengths


@pytest.mark.parametrize("first", [1, 3, 8])
def test_every_window_is_scored_once_in_order_and_no_round_is_too_short(monkeypatch, first):
    monkeypatch.setattr(racing, "FIRST_ROUND", first)
    for windows in range(1, 200):
        parts = rounds(windows)
        assert [window for part in parts for window in part] == list(range(windows))
        assert all(part.stop >= 2 * part.start for part in parts)
        assert all(part.stop < 4 * part.start for part in parts[1:])
        assert len(parts[0]) == min(first, windows) or len(parts) == 1


@pytest.mark.parametrize("windows", [0, -1])
def test_empty_rounds_are_refused(windows):
    with pytest.raises(ValueError, match="cannot be split into rounds"):
        rounds(windows)
