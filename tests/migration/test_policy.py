"""Policies see figures and decide; nothing else is needed to test them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kvmmig.migration.policy import (
    Continue,
    DowntimeLimit,
    FirstOf,
    GiveUp,
    MaxRounds,
    RoundFigures,
    Stop,
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
    class Tired:
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
