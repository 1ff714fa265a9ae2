"""``fault+TRANSPORT?fault.what=cut&fault.at=1MiB``: a way that fails where, when and how one wants.

It strikes once ``fault.at`` bytes have passed, counted from the beginning, or from the phase ``fault.phase``
where that is given; ``fault.seed`` chooses the byte at random below ``fault.at``. With none of the three it
strikes when the program says so, by `FaultWrapper.arm`, or a person, by the knob ``fault.strike``. All of it
is for tests and experiments: the channel stays within the contract, and the other side, or the guest there,
sees the damage.
"""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import trio

from kvmmig.errors import BadURI, ChannelBroken, ChannelClosed, KnobError
from kvmmig.transport import (
    AnyChannel,
    Knob,
    Option,
    PassingChannel,
    Side,
    Transport,
    TransportURI,
    Wrapper,
    on_phase,
)
from kvmmig.transport.toolkit import Interrupts, OneAtATime, TokenBucket, prefix
from kvmmig.units import SEED, format_size, parse_count, parse_duration, parse_size

_ALL = 1 << 62
_TRICKLE = 100.0  # bytes a second
_SHORT = 100  # the most bytes of a short accept
_WHATS = ("cut", "stall", "trickle", "short", "corrupt")
_SOMEWHERE = 64 << 20  # bytes, below which a seed chooses where it is not told


@dataclass(frozen=True, slots=True)
class _Plan:
    what: str
    sending: bool  # whether it strikes what is sent, or what is received
    at: int | None
    phase: str
    seed: int | None
    lasts: float  # seconds


class FaultWrapper(Wrapper):
    """Spoils one direction of a transport."""

    summary = "makes a transport fail, for tests and experiments"
    syntax = "fault+TRANSPORT:...[?fault.what=cut&fault.at=1MiB]"
    options = (
        Option("what", "what happens", "cut", _WHATS),
        Option("side", "what it happens to: what is sent, or what is received", "send", ("send", "receive")),
        Option("at", "after so many bytes, such as 1MiB"),
        Option(
            "phase",
            "at the beginning of a phase, or so many bytes later; the source alone has phases",
            choices=("setup", "rounds", "stop", "final", "commit"),
        ),
        Option("seed", "at a random byte below fault.at (64MiB), the same for the same number"),
        Option("for", "how long a stall, a trickle or short accepts last, such as 5s; without it, for ever"),
    )

    def __init__(self, uri: TransportURI, inner: Transport) -> None:
        super().__init__(uri, inner)
        at, seed, lasts = (self.option(name) for name in ("at", "seed", "for"))
        try:
            self._plan = _Plan(
                what=self.option("what"),
                sending=self.option("side") == "send",
                at=parse_size(at) if at else None,
                phase=self.option("phase"),
                seed=parse_count(seed, SEED) if seed else None,
                lasts=parse_duration(lasts) if lasts else math.inf,
            )
        except ValueError as error:
            raise BadURI(f"{str(uri)!r}: {error}") from error
        if seed and self._plan.at == 0:
            raise BadURI(
                f"{str(uri)!r}: there is no byte below 0 to choose; write fault.at=1MiB, or no fault.at"
            )
        if lasts and self._plan.what in ("cut", "corrupt"):
            raise BadURI(f"{str(uri)!r}: {self._plan.what} happens at once; fault.for is for what lasts")
        self._channels: list[FaultChannel] = []
        self._armed = not self._plan.phase and (self._plan.at is not None or self._plan.seed is not None)

    @asynccontextmanager
    async def wrap(self, channel: AnyChannel, *, side: Side) -> AsyncIterator[AnyChannel]:
        await trio.lowlevel.checkpoint()
        async with FaultChannel(channel, self._plan) as faulty:
            self._channels.append(faulty)
            if self._plan.phase:
                on_phase(faulty.enter_phase)
            if self._armed:
                faulty.arm()
            yield faulty

    def arm(self) -> None:
        """Count from now on: on all channels that it has made or will make. Strikes at once without `at`."""
        self._armed = True
        for channel in self._channels:
            channel.arm()


class FaultChannel(PassingChannel):
    """Does what the channel below does, until it strikes."""

    def __init__(self, below: AnyChannel, plan: _Plan) -> None:
        super().__init__(below)
        self.knobs = {**below.knobs, "fault.strike": Knob(self._now, self._turn)}
        self._plan = plan
        self._chance = random.Random(plan.seed or 0)
        self._sending, self._receiving = OneAtATime("sending"), OneAtATime("receiving")
        self._interrupts = Interrupts()
        self._left: int | None = None  # bytes until it strikes, once it is armed
        self._passed = 0
        self._ends = -math.inf  # when what lasts is over
        self._spoils = False  # the next byte
        self._bucket = TokenBucket(_TRICKLE)
        self._cut = False
        self._closed = False

    def arm(self) -> None:
        """Begin to count."""
        if self._left is not None:
            return
        plan = self._plan
        self._left = plan.at or 0
        if plan.seed is not None:
            self._left = self._chance.randrange(plan.at or _SOMEWHERE)
        if self._left == 0:
            self._strike()

    async def send_some(self, buffers: Sequence[memoryview]) -> int:
        async def move(most: int) -> int:
            if not (mine and self._spoils):
                return await self.below.send_some(prefix(buffers, most))
            count = await self.below.send_some([memoryview(bytes([buffers[0][0] ^ 1]))])
            self._spoils = False
            return count

        mine = self._plan.sending
        with self._sending:
            return await self._move(move, mine=mine)

    async def receive_some(self, buffer: memoryview) -> int:
        async def move(most: int) -> int:
            count = await self.below.receive_some(buffer[:most])
            if mine and self._spoils and count:
                buffer[0] ^= 1
                self._spoils = False
            return count

        mine = not self._plan.sending
        with self._receiving:
            return await self._move(move, mine=mine)

    async def flush(self) -> None:
        await self._unless_struck(self.below.flush)

    def abort(self) -> None:
        self._closed = True
        self._interrupts.now()
        super().abort()

    async def aclose(self) -> None:
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self._unless_struck(trio.lowlevel.checkpoint)
            await self.below.aclose()
        except ChannelClosed:
            self._check()
            raise
        finally:
            self.abort()

    def enter_phase(self, phase: str) -> None:
        """The migration enters this phase."""
        if phase == self._plan.phase:
            self.arm()

    def _now(self) -> str:
        lasting = trio.current_time() < self._ends
        return self._plan.what if self._cut or self._spoils or lasting else "none"

    def _turn(self, value: str) -> None:
        """Strike now, in one of the ways that ``fault.what`` knows; ``none`` ends what lasts."""
        if value == "none":
            self._ends = -math.inf
            self._interrupts.now()
        elif value in _WHATS:
            self._plan = replace(self._plan, what=value)
            self._left = 0
            self._strike()
        else:
            raise KnobError(f"fault.strike: {value!r} is no fault; there are {', '.join(_WHATS)}, and none")

    def _strike(self) -> None:
        match self._plan.what:
            case "cut":
                self._cut = True
                self.below.abort()
            case "corrupt":
                self._spoils = True
            case _:
                self._ends = trio.current_time() + self._plan.lasts
        self._interrupts.now()  # whoever waits below looks again: a cancelled call has moved nothing

    async def _move(self, move: Callable[[int], Awaitable[int]], *, mine: bool) -> int:
        counts: list[int] = []

        async def once() -> None:
            most = await self._most() if mine else _ALL
            counts.append(await move(most))

        await self._unless_struck(once, stalls=False)
        if mine:
            self._count(counts[0])
        return counts[0]

    async def _unless_struck(self, call: Callable[[], Awaitable[None]], *, stalls: bool = True) -> None:
        """Call it, again where a fault came in between, and not while a stall of the sending side lasts."""
        done = False
        while not done:
            self._check()
            try:
                with self._interrupts.allowed():
                    if stalls and self._plan.sending:
                        await self._stall()
                    await call()
                    done = True
            except ChannelClosed:
                self._check()
                raise

    async def _most(self) -> int:
        """How much may be moved now; waits for as long as nothing may."""
        await self._stall()
        if self._spoils:
            return 1
        if trio.current_time() >= self._ends:  # not yet, or over
            return self._left or _ALL
        if self._plan.what == "short":
            return self._chance.randint(1, _SHORT)
        while not (allowed := self._bucket.allowed()):
            with trio.move_on_at(self._ends):
                await self._bucket.wait()
            if trio.current_time() >= self._ends:
                return _ALL
        return allowed

    async def _stall(self) -> None:
        if self._plan.what == "stall" and trio.current_time() < self._ends:
            await trio.sleep_until(self._ends)

    def _count(self, count: int) -> None:
        self._passed += count
        if self._plan.what == "trickle" and trio.current_time() < self._ends:
            self._bucket.spend(count)  # what went before would be a debt of hours
        if self._left:
            self._left -= count
            if self._left == 0:
                self._strike()

    def _check(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the connection to {self.peer} was closed by this side")
        if self._cut:
            raise ChannelBroken(f"fault+ cut the connection to {self.peer} after {format_size(self._passed)}")
