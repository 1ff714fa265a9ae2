"""What a page shows of one machine: how it is now, and how its migration has come there.

A message is a dictionary of JSON with ``now``, the present, and these lists, of a list for each item:

=============  =======================================================================================
``samples``    seconds from the begin, rate, dirty rate (None in the first round), bytes that are pending
``rounds``     seconds at its begin, duration, bytes, bytes written meanwhile, whether it is the final pass
``maps``       the round, and as it began: each block's pending pages in per cent, how often it was sent;
               of the last one as it is now
``stalls``     seconds, duration, what held it: of a migration that is recorded
``happenings`` seconds, a text
=============  =======================================================================================

Rates are bytes a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvmmig.cli.counters import counter_rows
from kvmmig.cli.display import figure_pairs, phase_words, share_done
from kvmmig.migration.phases import PHASES
from kvmmig.migration.policy import RoundFigures
from kvmmig.migration.report import MigrationStatistics, Phase
from kvmmig.units import format_duration, format_size

#: Blocks of a page map: a beamer shows no more columns.
BLOCKS = 256
_PAGE = 4096
_MOST_SAMPLES = 600  # what is more is thinned out: a chart has no more columns
_MOST_ROWS = 200  # of each other list: the newest
_WORTH_SAYING = 0.1  # seconds of a stall: shorter ones are in the chart only
_LISTS = ("samples", "rounds", "maps", "stalls", "happenings")
_STANDS_STILL = (Phase.STOP, Phase.PRE_SWITCHOVER, Phase.FINAL, Phase.COMMIT, Phase.HANDED_OVER)

Message = dict[str, Any]
Row = list[Any]


class History:
    """Collects what comes from a machine. `news` is what is new, `whole` is all of it."""

    def __init__(self) -> None:
        #: The figures that were seen last, None before the machine's first migration.
        self.figures: MigrationStatistics | None = None
        self._about: Mapping[str, Any] = {}
        self._gone = False
        self._recorded: Mapping[str, float] | None = None  # the downtime's parts, where a record has them
        self._known: dict[str, list[Row]] = {name: [] for name in _LISTS}
        self._new: dict[str, list[Row]] = {name: [] for name in _LISTS}
        self._said = -1.0
        self._rounds_seen = 0
        self._began: Row | None = None  # the latest of the maps, as its round began
        self._said_now: Message = {}
        self._all_changed = True

    def is_another(self, figures: MigrationStatistics) -> bool:
        """Whether these are of a later migration than those seen last."""
        last = self.figures
        if last is None:
            return True
        if last.setup_time is None:
            return figures.total_time < last.total_time
        # No two migrations take equally long to set up, to the last digit.
        return figures.setup_time != last.setup_time

    def see_machine(self, about: Mapping[str, Any]) -> None:
        """What ``x-kvmmig-query-machine`` says."""
        self._about = about

    def see_figures(self, figures: MigrationStatistics) -> None:
        """What the monitor says of its migration. Another one takes the old one's place.

        A reply that an event has overtaken is passed over.
        """
        if self.is_another(figures):
            self._begin_anew()
        elif self.figures is not None and figures.total_time < self.figures.total_time:
            return
        self.figures = figures
        at, pending = round(figures.total_time, 3), figures.remaining_pages * _PAGE
        if not self._known["samples"] or at > self._known["samples"][-1][0]:
            dirty_rate = round(figures.dirty_rate) if figures.rounds else None
            self._add("samples", [at, round(figures.rate), dirty_rate, pending])
        begin = max(figures.setup_time or 0.0, self._end_of_rounds())
        for each in figures.rounds:
            if each.round >= self._rounds_seen:
                self._add_round(begin, each, final=False)
                begin += each.duration
        final = figures.final_pass
        if final is not None and final.round >= self._rounds_seen:
            begun = [event.at for event in figures.events if event.what == Phase.FINAL]
            self._add_round(begun[-1] if begun else begin, final, final=True)
        if figures.phase is Phase.DONE and self._known["maps"]:
            last, pending, sent = self._known["maps"][-1]
            if any(pending):
                self._put_map([last, [0] * len(pending), sent])
        for event in figures.events:
            if event.at > self._said:
                self._said = event.at
                self.see_happening(event.at, event.what)

    def see_map(
        self, round_number: int, block_pages: int, pending: Sequence[int], sent: Sequence[int], *, begin: bool
    ) -> None:
        """Memory as blocks of so many pages, the last one smaller; at the round's ``begin``, or now."""
        total = self.figures.total_pages if self.figures is not None else 0
        pages = [min(block_pages, total - start) for start in range(0, total, block_pages)]
        row: Row = [
            round_number,
            [100 * each // of for each, of in zip(pending, pages, strict=False)],
            [round(each / of, 1) for each, of in zip(sent, pages, strict=False)],
        ]
        maps = self._known["maps"]
        if begin or not maps or round_number > maps[-1][0]:
            if self._began is not None and self._began[0] < round_number:
                self._put_map(self._began)
            if not maps or round_number >= maps[-1][0]:
                self._began = row
        if not begin or not maps or round_number != maps[-1][0]:
            self._put_map(row)

    def see_stall(self, at: float, duration: float, held_by: str, words: str) -> None:
        """Nothing was accepted for so long, as a record has it."""
        self._add("stalls", [round(at, 3), round(duration, 4), held_by])
        if duration >= _WORTH_SAYING:
            held = f"{held_by}: {words}" if words else held_by
            self.see_happening(at, f"nothing was accepted for {format_duration(duration)} ({held})")

    def see_happening(self, at: float, words: str) -> None:
        """Something happened ``at`` that second of the migration."""
        self._add("happenings", [round(at, 3), words])

    def see_downtime(self, parts: Mapping[str, float]) -> None:
        """What a record says that the downtime was made of."""
        self._recorded = parts

    def see_end(self) -> None:
        """The machine is gone."""
        self._gone = True

    def news(self) -> Message | None:
        """What has changed since the last call: `whole` where that is simpler, None where nothing has."""
        now = self._now()
        if self._all_changed:
            message: Message | None = self.whole()
        elif now == self._said_now and not any(self._new.values()):
            message = None
        else:
            message = {"kind": "news", "now": now, **{name: rows for name, rows in self._new.items() if rows}}
        self._new = {name: [] for name in _LISTS}
        self._said_now, self._all_changed = now, False
        return message

    def whole(self) -> Message:
        """All that is known."""
        return {"kind": "whole", "now": self._now(), **{name: list(self._known[name]) for name in _LISTS}}

    def _begin_anew(self) -> None:
        for name in _LISTS:
            self._known[name].clear()
            self._new[name].clear()
        self._said, self._rounds_seen, self._began, self._recorded = -1.0, 0, None, None
        self._all_changed = True

    def _add(self, name: str, row: Row) -> None:
        rows = self._known[name]
        rows.append(row)
        self._new[name].append(row)
        if name == "samples" and len(rows) > _MOST_SAMPLES:
            del rows[1::2]
            self._all_changed = True
        elif len(rows) > _MOST_ROWS and name != "samples":
            del rows[0]

    def _put_map(self, row: Row) -> None:
        """In the place of the same round's, or as the last one."""
        for name, rows in (("maps", self._known["maps"]), ("new", self._new["maps"])):
            for index, each in enumerate(rows):
                if each[0] == row[0]:
                    rows[index] = row
                    break
            else:
                rows.append(row)
            if name == "maps" and len(rows) > _MOST_ROWS:
                del rows[0]

    def _add_round(self, begin: float, figures: RoundFigures, *, final: bool) -> None:
        self._rounds_seen = figures.round + 1
        written = figures.remaining_bytes
        self._add("rounds", [round(begin, 4), figures.duration, figures.sent_bytes, written, final])

    def _end_of_rounds(self) -> float:
        rounds = self._known["rounds"]
        return float(rounds[-1][0] + rounds[-1][1]) if rounds else 0.0

    def _going(self, figures: MigrationStatistics) -> Row | None:
        """The round, or the final pass, that has not ended: as in ``rounds``, without what is written."""
        if figures.setup_time is None or figures.final_pass is not None or PHASES[figures.phase].is_end:
            return None
        begin = max(figures.setup_time, self._end_of_rounds())
        sent = figures.sent_bytes - sum(each[2] for each in self._known["rounds"])
        return [begin, figures.total_time - begin, sent, 0, figures.phase in _STANDS_STILL]

    def _now(self) -> Message:
        about, figures = self._about, self.figures
        now: Message = {
            "machine": str(about.get("name", "")),
            "about": _about_words(about),
            "state": "has ended" if self._gone else str(about.get("status", "")),
            "gone": self._gone,
            "migration": None,
        }
        if figures is not None:
            now["migration"] = {**_migration(figures, self._recorded), "going": self._going(figures)}
        return now


def _about_words(about: Mapping[str, Any]) -> str:
    words = [str(about[name]) for name in ("guest",) if about.get(name)]
    if about.get("memory"):
        words.append(format_size(about["memory"]))
    if about.get("cpus"):
        words.append(f"{about['cpus']} vCPU{'s' if about['cpus'] != 1 else ''}")
    if about.get("incoming"):
        words.append(f"comes from {about['incoming']}")
    return ", ".join(words)


def _migration(figures: MigrationStatistics, recorded: Mapping[str, float] | None) -> Message:
    parts = figures.downtime_parts if recorded is None else recorded
    return {
        "peer": figures.peer,
        "phase": str(figures.phase),
        "words": phase_words(figures),
        "done": share_done(figures),
        "ended": PHASES[figures.phase].is_end,
        "stopped": figures.phase in _STANDS_STILL,
        "error": figures.error,
        "elapsed": figures.total_time,
        "memory": figures.total_pages * _PAGE,
        "figures": figure_pairs(figures) + counter_rows(figures.counters),
        "parts": [[name, seconds, format_duration(seconds)] for name, seconds in parts.items()],
        "turns": [list(bucket) for bucket in figures.turns.buckets],
        "bound": figures.step_bound,
        "notices": list(figures.notices),
    }
