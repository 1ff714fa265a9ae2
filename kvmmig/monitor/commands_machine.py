"""The machine itself: what it is, what it does, how fast it writes; stop, cont, reset, quit."""

from __future__ import annotations

from typing import Literal

import kvmmig
from kvmmig.monitor.control import MachineControl
from kvmmig.qmp import Arguments, CommandTable, NoArguments, QMPError, Session, version_info
from kvmmig.units import CALC_TIME

_MIB = 1 << 20


class CalcDirtyRateArguments(Arguments, frozen=True):
    calc_time: int
    calc_time_unit: Literal["second", "millisecond"] = "second"
    mode: Literal["dirty-bitmap", "page-sampling", "dirty-ring"] = "dirty-bitmap"


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
        status = control.run_state()
        return {"status": status, "running": status == "running"}

    @table.command("query-kvm")
    async def query_kvm(session: Session, arguments: NoArguments) -> object:
        return {"enabled": True, "present": True}

    @table.command("query-cpus-fast")
    async def query_cpus_fast(session: Session, arguments: NoArguments) -> object:
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

    @table.command("calc-dirty-rate", CalcDirtyRateArguments)
    async def calc_dirty_rate(session: Session, arguments: CalcDirtyRateArguments) -> None:
        if arguments.mode != "dirty-bitmap":
            raise QMPError(f"there is no mode '{arguments.mode}' here; use 'dirty-bitmap', or leave it out")
        milliseconds = arguments.calc_time * (1000 if arguments.calc_time_unit == "second" else 1)
        if milliseconds not in CALC_TIME:
            raise QMPError(f"Parameter 'calc-time' expects {CALC_TIME.in_words}")
        await control.settled()
        control.dirty_rate.begin(milliseconds / 1000)

    @table.command("query-dirty-rate", QueryDirtyRateArguments)
    async def query_dirty_rate(session: Session, arguments: QueryDirtyRateArguments) -> object:
        measured = control.dirty_rate
        factor = 1 if arguments.calc_time_unit == "second" else 1000
        reply: dict[str, object] = {
            "status": measured.status,
            "start-time": int(measured.start_time),
            "calc-time": round(measured.calc_time * factor),
            "calc-time-unit": arguments.calc_time_unit,
            "sample-pages": 0,
            "mode": "dirty-bitmap",
        }
        if measured.rate is not None:
            reply["dirty-rate"] = round(measured.rate / _MIB)
            reply["x-kvmmig-dirty-rate-bytes"] = measured.rate
        return reply
