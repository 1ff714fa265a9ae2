"""A transport that breaks one promise fails the suite, at the check of that promise and for that reason."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from kvmmig.testing import (
    CHECKS,
    CLOGGED_CHECKS,
    Call,
    Check,
    Ends,
    Maker,
    Nonconformance,
    Plan,
    _ends,
    check_plan,
    checks_for,
    memory_channel_pair,
    stream_ends,
)
from kvmmig.testing.checks import delivery, ending, listening
from kvmmig.transport import PassingChannel, Transport, TransportURI
from tests.transports import mutant_transports as transports
from tests.transports import mutants


@pytest.fixture
def no_patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What will never come is not waited for long."""
    if "a call has not ended" in request.node.name:
        monkeypatch.setattr(_ends, "PATIENCE", 0.7)
    monkeypatch.setattr(ending, "_AT_ONCE", 0.2)
    for checks, limit in ((delivery, "_FLUSH_PATIENCE"), (ending, "_GONE"), (listening, "_GONE")):
        monkeypatch.setattr(checks, limit, 0.2)
    yield
    for fds in (mutants.left_open, transports.left_open):
        while fds:
            os.close(fds.pop())


CHANNELS = [
    ("CancelledAfterSending", "cancelled_send_accepts_nothing", "8 bytes were accepted, 17 arrived"),
    ("CancelledAfterSending", "cancelled_calls_move_nothing", "bytes were accepted, .* arrived"),
    ("CancelledAfterReceiving", "cancelled_calls_move_nothing", "bytes were accepted, .* arrived"),
    ("NeverACheckpoint", "calls_are_checkpoints", "send_some returned without a checkpoint"),
    ("NeverACheckpoint", "cancelled_send_accepts_nothing", "send_some ignored a cancel"),
    ("Boasting", "bytes_arrive_in_order", "was offered .* and says it took"),
    ("SkippingEmptySends", "abort_frees_a_clogged_sender", "says it took 0"),
    ("Reordering", "bytes_arrive_in_order", "bytes that arrived differ"),
    ("Queueing", "clogged_sender_can_be_cancelled", "a second send_some .* raised"),
    ("NoBusy", "clogged_sender_can_be_cancelled", "raised BusyResourceError.*must raise ChannelBusy"),
    ("EndsByRaising", "end_of_stream_is_zero", "ChannelBroken"),
    ("SilentWhenClosed", "closing_is_idempotent", "send_some on a closed channel raised nothing"),
    ("SilentWhenBroken", "dead_receiver_is_noticed", "raised nothing; it must raise ChannelBroken"),
    ("FlushingNothing", "flush_means_delivered", "only 0 of 20000 bytes arrive while the sender rests"),
    ("ReadingAfterFlush", "buffers_can_be_used_again", "bytes that arrived differ"),
    ("ClaimingToCopy", "buffers_can_be_used_again", "bytes that arrived differ"),
    ("TakingAll", "no_call_holds_the_loop", "sending held the event loop .* for more than 10 ms"),
    ("HoldingTheLoop", "no_call_holds_the_loop", "sending held the event loop .* for more than 10 ms"),
    ("HoldingTheLoopWhileReceiving", "no_call_holds_the_loop", "receiving held the event loop"),
    ("LeavingADescriptor", "abort_leaves_nothing", "abort has left behind: descriptor .*/dev/null"),
    ("HalfDuplex", "waiting_for_an_answer_hinders_no_sender", "a call has not ended"),
    ("CompressingWithoutBound", "clogged_sender_can_be_cancelled", "a call has not ended"),
    ("RaisingAnything", "flush_means_delivered", "ValueError.* only a TransportError may"),
    ("Exiting", "flush_means_delivered", "SystemExit.* only a TransportError may"),
    ("KnobThatTakesAnything", "knobs", "turning mutant.rate to '' raised nothing; it must raise KnobError"),
    ("KnobThatRaisesAnything", "knobs", "raised ValueError.* must raise KnobError"),
    ("KnobThatChangesAnyway", "knobs", "mutant.rate has changed though turning it raised KnobError"),
    ("KnobThatForgetsItsUnit", "knobs", "mutant.rate can't be turned to its own value '5 bytes'"),
    ("CountersThatRaise", "counters_at_any_time", "counters after abort raised ChannelClosed.* never raises"),
    ("CountersOfText", "counters_at_any_time", "mutant.sent is '5 MB', not a number"),
    ("WaitsForNothing", "counters_at_any_time", "waits_for .* returned None, not a text"),
    ("CallSizeOfNothing", "attributes", "call_size is 0, not a size"),
]


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(("mutant", "check", "reason"), CHANNELS)
async def test_a_broken_channel_fails(mutant: str, check: str, reason: str) -> None:
    broken: type[PassingChannel] = getattr(mutants, mutant)
    with pytest.raises(Nonconformance, match=reason):
        await _check(check)(_around(broken, broken))


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    ("mutant", "check", "reason"),
    [
        ("Reordering", "bytes_arrive_in_order_on_the_way_back", "bytes that arrived differ"),
        ("Boasting", "bytes_arrive_in_order_on_the_way_back", "was offered .* and says it took"),
        ("OneWay", "attributes", "two_way is True at the source, False at the destination"),
    ],
)
async def test_a_destination_whose_way_back_is_broken_fails(mutant: str, check: str, reason: str) -> None:
    with pytest.raises(Nonconformance, match=reason):
        await _check(check)(_around(PassingChannel, getattr(mutants, mutant)))


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    "check",
    ["bytes_arrive_in_order_on_the_way_back", "both_ways_at_once", "waiting_for_an_answer_hinders_no_sender"],
)
async def test_a_source_that_can_hear_no_answer_fails(check: str) -> None:
    with pytest.raises(Nonconformance, match="nothing comes this way"):
        await _check(check)(_around(mutants.NoWayBack, PassingChannel))


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize(
    ("mutant", "check", "reason"),
    [
        ("DeadAfterACancel", "cancelled_accept", "that was it"),
        ("AcceptingOnce", "second_accept", "a call has not ended .* one source after the other"),
        ("NeverWoken", "listener_that_ends_while_accepting", "a call has not ended"),
        ("SayingText", "listener_says_where", "Listener.uri is 'memory:a', not a TransportURI"),
        ("TakingChannelsAlong", "channels_outlive_their_listener", "ChannelBroken"),
        ("ConnectingToNobody", "connect_to_nobody", "nobody listens any more raised nothing"),
        ("LeavingAfterACancel", "cancelled_connect_leaves_nothing", "have left behind: descriptor"),
        ("TakingAnyOption", "uris", "no-such-option.* raised nothing; it must raise BadURI"),
        ("KeepingItsURIAsText", "uris", "uri is 'memory:a', not a TransportURI"),
        ("OpeningEarly", "uris", "making a transport has opened something: descriptor"),
        ("StoringOnAbort", "aborted_file_never_appears", "aborted sender had sent raised nothing"),
        ("StoringAtFirst", "aborted_file_never_appears", "aborted sender had sent raised nothing"),
        ("StoringThoughCancelled", "cancelled_commit_leaves_nothing", "cancelled at turn 0 raised nothing"),
        ("StoringWhatFailed", "block_that_fails_stores_nothing", "block that was cancelled raised nothing"),
        ("StalledButStoring", "stalled_commit_can_be_cancelled", "100000 bytes can be received"),
        ("StalledForEver", "stalled_commit_can_be_cancelled", "a call has not ended"),
    ],
)
async def test_a_broken_transport_fails(mutant: str, check: str, reason: str) -> None:
    broken: type[Transport] = getattr(transports, mutant)
    with pytest.raises(Nonconformance, match=reason):
        await _check(check)(lambda: broken(TransportURI("memory", "a")))


_OF_A_CHANNEL = [
    check
    for check in checks_for(stores=False, two_way=True, arrives_at_once=True)
    if check.__name__ != "check_uris"
]


@pytest.mark.usefixtures("everything_applies")
@pytest.mark.parametrize("check", _OF_A_CHANNEL)
async def test_a_good_channel_passes(check: Check) -> None:
    await check(_around(PassingChannel, PassingChannel))


async def test_a_good_knob_passes() -> None:
    await _check("knobs")(_around(mutants.WithKnobs, mutants.WithKnobs))


@pytest.mark.parametrize("check", checks_for(stores=True))
async def test_a_good_store_passes(check: Check) -> None:
    transports.forget()
    await check(lambda: transports.MemoryStore(TransportURI("store", "a")))


@pytest.mark.usefixtures("no_patience")
async def test_a_listener_that_junk_ends_fails() -> None:
    with pytest.raises(Nonconformance, match=r"that was no greeting.* talk nonsense, hinder nobody"):
        await _check("junk_clients_are_survived")(
            lambda: transports.FailingOnJunk(TransportURI("odd", "127.0.0.1:0"))
        )


async def test_a_listener_that_waits_for_a_silent_client_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_HELD_UP", 0.3)
    with pytest.raises(Nonconformance, match=r"3 silent clients held up a source"):
        await _check("silent_clients_hold_up_nobody")(
            lambda: transports.FailingOnJunk(TransportURI("odd", "127.0.0.1:0"))
        )


async def test_a_good_store_that_is_stalled_passes() -> None:
    await _check("stalled_commit_can_be_cancelled")(lambda: transports.Stalled(TransportURI("store", "a")))


async def test_a_failure_is_one_sentence() -> None:
    with pytest.raises(Nonconformance) as caught:
        await _check("bytes_arrive_in_order")(_around(mutants.Boasting, mutants.Boasting))
    assert "\n" not in str(caught.value)
    assert "The promise: Whatever the buffers' sizes: what was accepted" in str(caught.value)


async def test_a_plan_finds_a_cancelled_call_that_moved_bytes() -> None:
    plan = Plan(sends=(Call((100,), 0), Call((7,), None)), receives=())
    with pytest.raises(Nonconformance, match="7 bytes were accepted, 107 arrived"):
        await check_plan(_around(mutants.CancelledAfterSending, PassingChannel), plan)


def _around(source: type[PassingChannel], destination: type[PassingChannel]) -> Maker:
    @asynccontextmanager
    async def make() -> AsyncIterator[Ends]:
        sender, receiver = memory_channel_pair(capacity=1 << 20)
        yield stream_ends(source(sender), destination(receiver))

    return make


def _check(name: str) -> Check:
    return next(c for c in (*CHECKS, *CLOGGED_CHECKS) if c.__name__ == f"check_{name}")
