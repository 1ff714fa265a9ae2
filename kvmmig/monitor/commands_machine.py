"""The machine itself: what it is, what it does, how fast it writes; stop, cont, reset, quit."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, UnsetType

import kvmmig
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import Arguments, CommandTable, NoArguments, QMPError, Session, version_info
from kvmmig.units import CALC_TIME, SAMPLE_PAGES

_MIB = 1 << 20
_SAMPLE_PAGES = 512  # of each GiB, as QEMU has it
_NO_UUID = "00000000-0000-0000-0000-000000000000"


class CalcDirtyRateArguments(Arguments, frozen=True):
    calc_time: int
    calc_time_unit: Literal["second", "millisecond"] = "second"
    sample_pages: int | UnsetType = UNSET
    mode: Literal["dirty-bitmap", "page-sampling", "dirty-ring"] | UnsetType = UNSET


class SetActionArguments(Arguments, frozen=True):
    reboot: Literal["reset", "shutdown"] | UnsetType = UNSET
    shutdown: Literal["poweroff", "pause"] | UnsetType = UNSET
    panic: Literal["pause", "shutdown", "exit-failure", "none"] | UnsetType = UNSET
    watchdog: Literal["reset", "shutdown", "poweroff", "pause", "debug", "none", "inject-nmi"] | UnsetType = (
        UNSET
    )


#: What follows a guest's reset, shutdown or crash, always. There is no watchdog that could want anything.
_ACTIONS = {"reboot": "shutdown", "shutdown": "poweroff", "panic": "shutdown"}


class QueryDirtyRateArguments(Arguments, frozen=True):
    calc_time_unit: Literal["second", "millisecond"] = "second"


def add_machine_commands(table: CommandTable, control: MachineControl) -> None:
    """Add them to the table."""

    @table.command("query-version")
    async def query_version(session: Session, arguments: NoArguments) -> object:
        return version_info(f"kvmmig {kvmmig.__version__}")

    @table.command("query-name")
    async def query_name(session: Session, arguments: NoArguments) -> object:
        return {"name": control.name}

    @table.command("query-status")
    async def query_status(session: Session, arguments: NoArguments) -> object:
        await control.settled()  # its guest runs as soon as it is there
        status = control.run_state()
        return {"status": status, "running": status == "running"}

    @table.command("query-kvm")
    async def query_kvm(session: Session, arguments: NoArguments) -> object:
        return {"enabled": True, "present": True}

    @table.command("query-cpus-fast")
    async def query_cpus_fast(session: Session, arguments: NoArguments) -> object:
        await control.settled()
        threads = control.machine.thread_ids if control.machine is not None else ()
        return [
            {
                "cpu-index": index,
                "qom-path": f"/machine/cpu[{index}]",
                "thread-id": thread,
                "props": {"core-id": 0, "thread-id": 0, "socket-id": index},
                "target": "x86_64",
            }
            for index, thread in enumerate(threads)
        ]

    @table.command("query-memory-size-summary")
    async def query_memory_size_summary(session: Session, arguments: NoArguments) -> object:
        await control.settled()
        memory = control.machine.config.memory if control.machine is not None else 0
        return {"base-memory": memory, "plugged-memory": 0}

    @table.command("stop")
    async def stop(session: Session, arguments: NoArguments) -> None:
        await control.pause()

    @table.command("cont")
    async def cont(session: Session, arguments: NoArguments) -> None:
        await control.resume()

    @table.command("system_reset")
    async def system_reset(session: Session, arguments: NoArguments) -> None:
        await control.reset()

    @table.command("quit")
    async def quit_(session: Session, arguments: NoArguments) -> None:
        control.quit()
        session.ended = True

    @table.command("system_powerdown")
    async def system_powerdown(session: Session, arguments: NoArguments) -> None:
        control.power_down()

    @table.command("set-action", SetActionArguments)
    async def set_action(session: Session, arguments: SetActionArguments) -> None:
        for what, action in _ACTIONS.items():
            if getattr(arguments, what) not in (UNSET, action):
                raise QMPError(f"Parameter '{what}' can only be '{action}': that is what always happens here")

    @table.command("x-exit-preconfig")
    async def exit_preconfig(session: Session, arguments: NoArguments) -> None:
        raise QMPError("The command is permitted only before machine initialization")

    @table.command("query-uuid")
    async def query_uuid(session: Session, arguments: NoArguments) -> object:
        return {"UUID": _NO_UUID}

    @table.command("query-block")
    async def query_block(session: Session, arguments: NoArguments) -> object:
        return []

    @table.command("query-chardev")
    async def query_chardev(session: Session, arguments: NoArguments) -> object:
        return []

    @table.command("calc-dirty-rate", CalcDirtyRateArguments)
    async def calc_dirty_rate(session: Session, arguments: CalcDirtyRateArguments) -> None:
        milliseconds = arguments.calc_time * (1000 if arguments.calc_time_unit == "second" else 1)
        if milliseconds not in CALC_TIME:
            raise QMPError("Calculation time is out of range [50ms, 60000ms].")
        sample_pages = _sample_pages(arguments)
        await control.settled()
        control.dirty_rate.begin(milliseconds / 1000, sample_pages=sample_pages)

    @table.command("query-dirty-rate", QueryDirtyRateArguments)
    async def query_dirty_rate(session: Session, arguments: QueryDirtyRateArguments) -> object:
        measured = control.dirty_rate
        factor = 1 if arguments.calc_time_unit == "second" else 1000
        reply: dict[str, object] = {
            "status": measured.status,
            "start-time": int(measured.start_time),
            "calc-time": round(measured.calc_time * factor),
            "calc-time-unit": arguments.calc_time_unit,
            "sample-pages": measured.sample_pages,
            "mode": measured.mode,
        }
        if measured.rate is not None:
            reply["dirty-rate"] = round(measured.rate / _MIB)
            reply["x-kvmmig-dirty-rate-bytes"] = measured.rate
        return reply


def _sample_pages(arguments: CalcDirtyRateArguments) -> int:
    """Pages to be sampled of each GiB; 0 where the dirty log is to be read. Raises `QMPError`."""
    given = arguments.sample_pages
    if arguments.mode in ("dirty-bitmap", "dirty-ring") and given is not UNSET:
        raise QMPError("sample-pages is used only in page-sampling mode")
    if given is not UNSET and given not in SAMPLE_PAGES:
        raise QMPError("sample-pages is out of range[128, 16384].")
    if arguments.mode == "dirty-ring":
        raise QMPError("mode dirty-ring is not enabled, use other method instead.")
    if given is not UNSET:
        return given
    return _SAMPLE_PAGES if arguments.mode == "page-sampling" else 0
