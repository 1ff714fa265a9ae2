"""The token bucket: no more than allowed, whatever the moments of asking."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from kvmmig.transport.toolkit import rate as rate_module
from kvmmig.transport.toolkit.rate import TokenBucket


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_a_rate_there_is_no_limit() -> None:
    bucket = TokenBucket()
    assert bucket.allowed() is None
    bucket.spend(10**12)
    assert bucket.allowed() is None


@given(st.lists(st.floats(0.0, 0.05), min_size=1, max_size=200), st.floats(1e3, 1e10))
def test_in_no_100_ms_more_passes_than_the_rate_and_its_credit(pauses: list[float], rate: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(rate_module, "perf_counter", clock)
        bucket = TokenBucket(rate)
        sent: list[tuple[float, int]] = []
        for pause in pauses:
            clock.now += pause
            allowed = bucket.allowed()
            assert allowed is not None
            bucket.spend(allowed)
            sent.append((clock.now, allowed))
        for start, _ in sent:
            window = sum(count for at, count in sent if start <= at < start + 0.1)
            assert window <= rate * (0.1 + rate_module._CREDIT) * 1.001 + 1


def test_a_new_rate_holds_from_now_on() -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(rate_module, "perf_counter", clock)
        bucket = TokenBucket(1e9)
        clock.now = 1.0
        bucket.rate = 1000.0
        assert bucket.allowed() == 0, "what the old rate had saved is gone"
        clock.now += 0.0155
        assert bucket.allowed() == 15


def test_what_was_on_its_way_when_the_rate_was_set_is_waited_for() -> None:
    bucket = TokenBucket()
    assert bucket.allowed() is None
    bucket.rate = 1e6
    bucket.spend(10**9)  # sent when there was no limit yet
    assert bucket.allowed() == 0


async def test_who_is_kept_from_sending_for_100_ms_makes_up_for_it() -> None:
    """A busy host wakes whoever waits late, again and again; the rate is reached all the same."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(rate_module, "perf_counter", clock)

        async def wake_late(_: float) -> None:
            clock.now += 0.095

        patch.setattr(trio, "sleep", wake_late)
        bucket, sent = TokenBucket(20e6), 0
        while clock.now < 10:
            while bucket.allowed() == 0:
                await bucket.wait()
            allowed = bucket.allowed()
            assert allowed is not None
            bucket.spend(allowed)
            sent += allowed
        assert sent == pytest.approx(20e6 * clock.now, rel=0.001)


@pytest.mark.parametrize("pause", [0.09, 5.0])
def test_a_pause_before_a_round_is_no_credit_for_it(pause: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(rate_module, "perf_counter", clock)
        bucket = TokenBucket(50e6)
        clock.now += pause
        bucket.begin()
        assert bucket.allowed() == 0
        clock.now += 0.006
        assert bucket.allowed() == pytest.approx(300_000, abs=1)


@pytest.mark.parametrize("pause", [0.11, 5.0])
def test_a_channel_that_nobody_uses_saves_nothing_up(pause: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(rate_module, "perf_counter", clock)
        bucket = TokenBucket(50e6)
        clock.now += pause
        assert bucket.allowed() == 0


async def test_who_loses_the_cpu_while_it_sends_makes_up_for_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sent = Clock(), 0
    monkeypatch.setattr(rate_module, "perf_counter", clock)
    bucket = TokenBucket(20e6)
    while clock.now < 10:
        clock.now += 0.06
        allowed = bucket.allowed()
        assert allowed is not None
        sent += allowed
        bucket.spend(allowed)
    assert sent == pytest.approx(20e6 * clock.now, rel=0.001)
