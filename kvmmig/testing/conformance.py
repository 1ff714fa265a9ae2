"""What every transport must do, as functions that any test framework can call.

Each check takes a function that makes your transport afresh, as the destination has it, and raises
`Nonconformance` with one sentence where it breaks the contract of `kvmmig.transport`. That is a whole test::

    @pytest.mark.parametrize("check", CHECKS)
    async def test_ws(check):
        await check(lambda: WsTransport(TransportURI("ws", "127.0.0.1:0")))

The source connects to what `Listener.uri` says, with the same options and wrappers. Where it can't be found
so, the function returns two transports: the source's and the destination's. For channels without a transport
it returns a context in which there are `Ends`.

Of `CHECKS`, those of something that your transport has not, such as a way back, pass at once; `checks_for`
leaves them out. `CLOGGED_CHECKS` are for a store too, if the function makes one whose disk hangs. The checks
are seeded, so a failure comes again; `kvmmig.testing.plans` has one more that hypothesis drives.
"""

from __future__ import annotations

from kvmmig.testing._ends import Check
from kvmmig.testing.checks.delivery import (
    check_buffers_can_be_used_again,
    check_bytes_arrive_in_order,
    check_calls_are_checkpoints,
    check_cancelled_calls_move_nothing,
    check_cancelled_send_accepts_nothing,
    check_end_of_stream_is_zero,
    check_flush_can_be_cancelled,
    check_flush_means_delivered,
)
from kvmmig.testing.checks.ending import (
    check_abort_frees_a_clogged_sender,
    check_abort_leaves_nothing,
    check_clogged_sender_can_be_cancelled,
    check_closing_is_idempotent,
    check_dead_receiver_is_noticed,
    check_dead_sender_ends_the_stream,
    check_waiting_receiver_is_woken,
)
from kvmmig.testing.checks.listening import (
    check_cancelled_accept,
    check_cancelled_connect_leaves_nothing,
    check_channels_outlive_their_listener,
    check_connect_to_nobody,
    check_junk_clients_are_survived,
    check_listener_that_ends_while_accepting,
    check_second_accept,
    check_silent_clients_hold_up_nobody,
)
from kvmmig.testing.checks.loop import check_no_call_holds_the_loop
from kvmmig.testing.checks.random_access import (
    check_aborted_write_never_appears,
    check_bytes_are_found_at_their_offsets,
    check_cancelled_write_accepts_nothing,
    check_settled_buffers_can_be_used_again,
)
from kvmmig.testing.checks.saying import (
    check_attributes,
    check_counters_at_any_time,
    check_knobs,
    check_listener_says_where,
    check_uris,
)
from kvmmig.testing.checks.stored import (
    check_aborted_file_never_appears,
    check_block_that_fails_stores_nothing,
    check_cancelled_commit_leaves_nothing,
    check_stalled_commit_can_be_cancelled,
)
from kvmmig.testing.checks.two_way import (
    check_both_ways_at_once,
    check_waiting_for_an_answer_hinders_no_sender,
    on_the_way_back,
)

_ALL: tuple[Check, ...] = (
    check_bytes_arrive_in_order,
    check_cancelled_calls_move_nothing,
    check_cancelled_send_accepts_nothing,
    check_calls_are_checkpoints,
    check_flush_can_be_cancelled,
    check_flush_means_delivered,
    check_buffers_can_be_used_again,
    check_end_of_stream_is_zero,
    check_no_call_holds_the_loop,
    check_closing_is_idempotent,
    check_abort_leaves_nothing,
)
_SAYING: tuple[Check, ...] = (
    check_attributes,
    check_counters_at_any_time,
    check_knobs,
    check_uris,
)
#: For connections.
_STREAM: tuple[Check, ...] = (
    check_dead_receiver_is_noticed,
    check_waiting_receiver_is_woken,
    check_dead_sender_ends_the_stream,
    check_abort_frees_a_clogged_sender,
    check_clogged_sender_can_be_cancelled,
)
_LISTENING: tuple[Check, ...] = (
    check_listener_says_where,
    check_cancelled_accept,
    check_second_accept,
    check_channels_outlive_their_listener,
    check_listener_that_ends_while_accepting,
    check_connect_to_nobody,
    check_cancelled_connect_leaves_nothing,
    check_junk_clients_are_survived,
    check_silent_clients_hold_up_nobody,
)
#: Those that connect a bare socket to where it listens.
_BARE = (check_junk_clients_are_survived, check_silent_clients_hold_up_nobody)
_TWO_WAY: tuple[Check, ...] = (
    check_both_ways_at_once,
    check_waiting_for_an_answer_hinders_no_sender,
    *(on_the_way_back(check) for check in (*_ALL, *_STREAM)),
)
_STORED: tuple[Check, ...] = (
    check_aborted_file_never_appears,
    check_block_that_fails_stores_nothing,
    check_cancelled_commit_leaves_nothing,
)

#: For a transport that has random access, besides the others.
RANDOM_ACCESS_CHECKS: tuple[Check, ...] = (
    check_bytes_are_found_at_their_offsets,
    check_settled_buffers_can_be_used_again,
    check_cancelled_write_accepts_nothing,
    check_aborted_write_never_appears,
)

#: All of them, for any transport.
CHECKS: tuple[Check, ...] = (
    *(*_ALL, *_SAYING, *_STREAM, *_LISTENING, *_TWO_WAY, *_STORED),
    *RANDOM_ACCESS_CHECKS,
)

#: For a sender that nothing leaves: also for a store, if it is made so that its disk hangs.
CLOGGED_CHECKS: tuple[Check, ...] = (
    check_abort_frees_a_clogged_sender,
    check_clogged_sender_can_be_cancelled,
    check_stalled_commit_can_be_cancelled,
)


def checks_for(
    *, stores: bool, two_way: bool = False, arrives_at_once: bool = False, has_socket: bool = True
) -> tuple[Check, ...]:
    """Those of `CHECKS` that apply to a transport that ``stores``, or to one that connects.

    ``two_way`` is what its channels are. To one that ``arrives_at_once``, as an inherited descriptor does,
    nobody connects. It ``has_socket`` where a bare TCP or Unix socket reaches its listener.
    """
    if stores:
        return (*_ALL, *_SAYING, *_STORED)
    listening = () if arrives_at_once else _LISTENING
    if not has_socket:
        listening = tuple(check for check in listening if check not in _BARE)
    return (*_ALL, *_SAYING, *_STREAM, *listening, *(_TWO_WAY if two_way else ()))
