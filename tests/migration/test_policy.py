"""Policies see figures and decide; nothing else is needed to test them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvmmig.migration.policy import (
    AutoConverge,
    Continue,
    Decision,
    DowntimeLimit,
    FirstOf,
    GiveUp,
    MaxRounds,
    NoProgress,
    Policy,
    RateAdaptive,
    RoundFigures,
    Saving,
    Stop,
    Stopped,
    default_policy,
)

ROUND = RoundFigures(
    round=3,
    sent_pages=1000,
    zero_pages=0,
    sent_bytes=4096_000,
    duration=0.1,
    dirty_pages=1000,
    rate=40_960_000.0,
    dirty_rate=40_960_000.0,
)


def test_expected_downtime_is_what_is_left_at_the_rounds_rate() -> None:
    assert ROUND.expected_downtime == pytest.approx(0.1)


def test_without_a_rate_nothing_is_expected_to_end() -> None:
    assert math.isinf(replace(ROUND, rate=0.0).expected_downtime)


@pytest.mark.parametrize(("limit", "decision"), [(0.11, Stop()), (0.09, Continue())])
def test_the_downtime_limit_stops_only_what_fits(limit: float, decision: object) -> None:
    assert DowntimeLimit(limit).decide(ROUND) == decision


@pytest.mark.parametrize(("rounds", "decision"), [(5, Continue()), (4, Stop()), (1, Stop())])
def test_max_rounds_counts_the_round_that_sent_all_of_memory(rounds: int, decision: object) -> None:
    assert MaxRounds(rounds).decide(ROUND) == decision


def test_the_first_policy_that_has_an_opinion_is_obeyed() -> None:
    class Tired(Policy):
        def decide(self, figures: RoundFigures) -> GiveUp:
            return GiveUp("tired")

    assert FirstOf(DowntimeLimit(0.01), Tired(), MaxRounds(1)).decide(ROUND) == GiveUp("tired")
    assert FirstOf(MaxRounds(9)).decide(ROUND) == Continue()


def test_a_guest_that_never_gets_calmer_moves_all_the_same() -> None:
    policy = default_policy()
    hopeless = replace(ROUND, rate=1.0)
    decisions = [policy.decide(replace(hopeless, round=i)) for i in range(30)]
    assert decisions[:-1] == [Continue()] * 29
    assert decisions[-1] == Stop()


def decide_all(policy: Policy, dirty_pages: list[int]) -> list[Decision]:
    return [policy.decide(replace(ROUND, round=i, dirty_pages=n)) for i, n in enumerate(dirty_pages)]


def test_no_progress_waits_as_long_as_the_rounds_shrink() -> None:
    assert decide_all(NoProgress(2), [1000, 900, 800, 700]) == [Continue()] * 4


def test_no_progress_stops_when_they_no_longer_do() -> None:
    assert decide_all(NoProgress(2), [1000, 500, 490, 510]) == [Continue()] * 3 + [Stop()]
    assert decide_all(NoProgress(2), [1000, 1000, 500, 600, 400]) == [Continue()] * 5, (
        "one shrinks, patience anew"
    )


def test_rate_adaptive_sends_at_the_dirty_rate_and_a_little_more() -> None:
    policy = RateAdaptive(minimum=10e6, maximum=100e6)
    assert policy.start() == Continue(bandwidth=10e6)
    assert policy.decide(replace(ROUND, dirty_rate=20e6)) == Continue(bandwidth=20e6 + 50e6 / 8)
    assert policy.decide(replace(ROUND, dirty_rate=1e6)) == Continue(bandwidth=10e6)


def test_rate_adaptive_stops_at_its_cap_or_when_little_is_left() -> None:
    policy = RateAdaptive(minimum=10e6, maximum=100e6)
    assert policy.decide(replace(ROUND, dirty_rate=99e6)) == Stop(bandwidth=100e6)
    assert policy.decide(replace(ROUND, dirty_rate=1e6, dirty_pages=63)) == Stop(bandwidth=100e6)
    assert isinstance(policy.decide(replace(ROUND, dirty_rate=1e6, dirty_pages=64)), Continue)


def test_auto_converge_slows_down_after_two_bad_rounds_and_more_each_time() -> None:
    decisions = decide_all(AutoConverge(0.2, 0.1, 0.35), [1000] * 8)
    throttles = [decision.throttle for decision in decisions if isinstance(decision, Continue)]
    assert throttles == [None, 0.2, None, pytest.approx(0.3), None, 0.35, None, 0.35]


def test_auto_converge_leaves_a_guest_alone_whose_rounds_halve() -> None:
    assert decide_all(AutoConverge(), [100] * 6) == [Continue()] * 6


def test_wishes_of_several_policies_are_kept_together() -> None:
    policy = FirstOf(AutoConverge(first=0.5), RateAdaptive(10e6, 1e9))
    assert policy.start() == Continue(bandwidth=10e6)
    first, second = decide_all(policy, [1000, 1000])
    assert first == Continue(bandwidth=ROUND.dirty_rate + RateAdaptive.INCREMENT)
    assert second == Continue(bandwidth=ROUND.dirty_rate + RateAdaptive.INCREMENT, throttle=0.5)


def saving(*rounds: tuple[int, int]) -> list[object]:
    """What `Saving` decides after rounds that sent, and left, so many pages."""
    policy = Saving()
    return [
        policy.decide(
            replace(ROUND, round=i, sent_bytes=sent * 4096, dirty_pages=left, rate=1.0, link_rate=1.0)
        )
        for i, (sent, left) in enumerate(rounds)
    ]


def test_a_save_goes_on_only_while_rounds_shrink_and_little_is_sent_again() -> None:
    assert saving((1000, 250), (250, 250)) == [Continue(), Stop()], "rewritten flat out"
    assert saving((1000, 501)) == [Stop()]
    assert saving((1000, 300), (300, 100), (100, 30)) == [Continue(), Continue(), Continue()]
    assert saving((1000, 400), (400, 150)) == [Continue(), Stop()], "more than half of it again"
    assert saving((10**6, 1000), (1000, 100), (100, 10), (10, 1))[-1] == Stop()
    assert Saving().decide(replace(ROUND, dirty_pages=0)) == Stop()


def test_who_wants_no_live_round_is_heard_before_the_first_one() -> None:
    assert FirstOf(MaxRounds(), Stopped()).start() == Stop()
