"""Tier one: the trial of compressed against exact steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from lightning_powersgd.compressor.trial import PAUSE, Trial, defects_of


def play(trial: Trial, steps: int, compressed: Callable[[], float], exact: Callable[[], float]) -> str:
    """Make steps that take so many seconds; give a letter for each: compressed or exact."""
    made = ""
    for _ in range(steps):
        made += "c" if trial.compressing else "e"
        seconds = compressed() if trial.compressing else exact()
        if trial.timed is not None:
            trial.timed.append(seconds)
        trial.finish_step()
        if trial.asks:
            trial.answer(*trial.medians())
    return made


def always(seconds: float) -> Callable[[], float]:
    return lambda: seconds


@pytest.mark.parametrize(
    ("compressed", "exact", "begins", "then"),
    [
        pytest.param(1.0, 2.0, "c" * 10 + "e" * 3, "c", id="twice as fast"),
        pytest.param(2.0, 1.0, "c" * 10 + "e" * 3, "e", id="half as fast"),
        pytest.param(1.0, 1.3, "c" * 10 + "e" * 3 + "c" * 5 + "e" * 5, "c", id="faster"),
        pytest.param(1.3, 1.0, "c" * 10 + "e" * 3 + "c" * 5 + "e" * 5, "e", id="slower"),
        pytest.param(1.0, 1.05, "c" * 10 + "e" * 3 + "c" * 5 + "e" * 5 + "c" * 9 + "e" * 9, "c", id="a little faster"),
        pytest.param(1.05, 1.0, "c" * 10 + "e" * 3 + "c" * 5 + "e" * 5 + "c" * 9 + "e" * 9, "e", id="a little slower"),
        pytest.param(1.02, 1.0, "c" * 10 + "e" * 3 + "c" * 5 + "e" * 5 + "c" * 9 + "e" * 9, "c", id="hardly slower"),
    ],
)
def test_the_faster_way_is_taken_after_as_few_steps_as_tell(compressed, exact, begins, then):
    trial = Trial(world_size=2)
    made = play(trial, len(begins) + PAUSE, always(compressed), always(exact))
    assert made == begins + then * PAUSE
    assert trial.ratio == compressed / exact
    assert trial.decisions == 1
    assert trial.rests_exact is False  # the next trial begins


def test_what_was_decided_is_asked_again_and_may_change():
    trial = Trial(world_size=2)
    play(trial, 13, always(2.0), always(1.0))
    assert trial.rests_exact
    assert play(trial, PAUSE, always(1.0), always(2.0)) == "e" * PAUSE
    assert play(trial, 9, always(1.0), always(2.0)) == "e" * 5 + "c" * 3 + "c"
    assert trial.chosen


def test_hardly_faster_is_no_reason_to_change_in_either_direction():
    trial = Trial(world_size=2)
    play(trial, 13, always(2.0), always(1.0))
    play(trial, PAUSE + 5 + 3 + 10 + 18, always(1.0), always(1.02))
    assert trial.decisions == 2
    assert not trial.chosen


@pytest.mark.parametrize("known", ["by the network", "by the last trial"])
def test_hopeless_steps_are_not_made(known):
    trial = Trial(world_size=2)
    if known == "by the network":
        trial.exact_forecast = 3.1
    else:
        play(trial, 13, always(1.0), always(3.1))
    steps = 3 * (PAUSE + 5)
    assert play(trial, steps, always(1.0), always(3.1)) == "c" * steps
    assert trial.decisions >= 2


def test_one_long_step_among_few_does_not_decide():
    trial = Trial(world_size=2)
    disturbed = itertools.chain([1.0, 9.0], itertools.repeat(1.0))
    play(trial, 100, always(1.3), lambda: next(disturbed))
    assert not trial.chosen


def noisy(trial: Trial, steps: range) -> str:
    """Make steps whose times depend on their number alone."""
    made = ""
    for step in steps:
        noise = (1.0, 1.1, 0.9, 1.3, 1.0)[step % 5]
        made += play(trial, 1, always(1.05 * noise), always(noise))
    return made


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_it_goes_on_from_a_checkpoint_as_it_would_have(cut):
    whole, before = Trial(world_size=2), Trial(world_size=2)
    made = noisy(whole, range(60))
    first = noisy(before, range(cut))
    saved = before.to_dict()
    assert defects_of(saved) == []
    after = Trial(**saved)
    assert first + noisy(after, range(cut, 60)) == made
    assert after == whole


def test_times_that_are_lost_end_in_no_change():
    trial = Trial(world_size=2)
    for _ in range(10 + 3 + 10 + 18):
        trial.finish_step()
        if trial.asks:
            trial.answer(*trial.medians())
    assert trial.chosen
    assert (trial.decisions, trial.ratio) == (1, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("chosen", 1),
        ("position", 10**6),
        ("position", -PAUSE - 1),
        ("decisions", 1.0),
        ("exact_forecast", "long"),
        ("exact_seconds", [1.0, "2"]),
        ("compressed_seconds", [float("nan")]),
        ("ratio", -1.0),
        ("world_size", None),
    ],
)
def test_what_no_trial_has_written_is_told(key, value):
    (defect,) = defects_of(Trial(world_size=2).to_dict() | {key: value})
    assert key in defect


@pytest.mark.parametrize("saved", [None, [], {"chosen": True}])
def test_what_is_no_trial_is_told(saved):
    assert defects_of(saved)
