"""One handoff as both ranks saw it, on the clock of their host: what was hidden, as text and as a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.messages.fleet import ReplicaInfo, Role
from core.messages.to_rank import ReadTimeline, TimelineEvent
from rpc.client import RpcClient
from rpc.methods import READ_TIMELINE

TIMEOUT_S = 5.0
COLUMNS = 72
COLOURS = {
    "compute": "tab:blue",
    "draw": "tab:cyan",
    "wait": "lightgrey",
    "gather": "tab:olive",
    "wire": "tab:orange",
    "scatter": "tab:green",
    "digest": "tab:purple",
    "handoff": "tab:grey",
}


@dataclass(frozen=True)
class HandoffTimeline:
    """Events of the rank that prefilled and of the one that went on, first ranks both."""

    prefill: tuple[TimelineEvent, ...]
    decode: tuple[TimelineEvent, ...]

    @property
    def computed_at(self) -> float:
        """Prefill has drawn the first token."""
        return max(event.ended_at for event in self._of("compute") + self._of("draw"))

    @property
    def ready_at(self) -> float:
        """Decode has every byte and the first token, and may go on."""
        return max(event.ended_at for event in self._of("handoff"))

    @property
    def compute_s(self) -> float:
        """All that prefill's engine did for the prompt."""
        return sum(map(seconds, self._of("compute") + self._of("draw")))

    @property
    def wire_s(self) -> float:
        """All slabs on the wire, as the receiver saw them."""
        return sum(seconds(event) for event in self.decode if event.phase == "wire")

    @property
    def exposed_s(self) -> float:
        """What a handoff that costs nothing would not have waited for, control messages included."""
        return max(0.0, self.ready_at - self.computed_at)

    @property
    def least_exposed_s(self) -> float:
        """What the same wire exposes after the same compute when nothing else takes time.

        Slabs of one order are on the wire one after another, from the moment that their layers are computed. The last
        order belongs to the last layers, and so on backwards; what is ordered before was cached.
        """
        slabs = zip(self._of("wait"), (event for event in self.decode if event.phase == "wire"), strict=True)
        by_order: dict[float, float] = {}
        for wait, wire in slabs:
            by_order[wait.begun_at] = by_order.get(wait.begun_at, 0.0) + seconds(wire)
        wire_s = [by_order[asked_at] for asked_at in sorted(by_order)]
        computed_at = [event.ended_at for event in self._of("compute")][-len(wire_s) :]
        free_at = sum(wire_s[: len(wire_s) - len(computed_at)]) + computed_at[0]
        for moment, order_s in zip(computed_at, wire_s[len(wire_s) - len(computed_at) :], strict=True):
            free_at = max(free_at, moment) + order_s
        return max(0.0, free_at - self.computed_at)

    @property
    def hidden_share(self) -> float:
        """Of the wire's time; below 0 when control messages alone take longer than the wire."""
        return 1 - self.exposed_s / self.wire_s

    @property
    def num_bytes(self) -> int:
        """Came over the wire."""
        return sum(event.num_bytes for event in self.decode if event.phase == "wire")

    def rows(self) -> list[tuple[str, list[TimelineEvent]]]:
        """(rank and phase, events), prefill's first."""
        found: dict[str, list[TimelineEvent]] = {}
        for role, events in (("prefill", self.prefill), ("decode", self.decode)):
            for phase in COLOURS:
                some = [event for event in events if event.phase == phase]
                if some:
                    found[f"{role} {phase}"] = some
        return list(found.items())

    def _of(self, phase: str) -> tuple[TimelineEvent, ...]:
        return tuple(event for event in (*self.prefill, *self.decode) if event.phase == phase)


def seconds(event: TimelineEvent) -> float:
    """How long it took."""
    return event.ended_at - event.begun_at


async def read_handoff(client: RpcClient, infos: Mapping[Role, ReplicaInfo], request_id: str) -> HandoffTimeline:
    """Asks both ranks. Raises PeerLost."""
    message = ReadTimeline(request_id)
    prefill = await client.call(infos[Role.PREFILL].address, READ_TIMELINE, message, TIMEOUT_S)
    decode = await client.call(infos[Role.DECODE].address, READ_TIMELINE, message, TIMEOUT_S)
    return HandoffTimeline(prefill.events, decode.events)


def print_timeline(timeline: HandoffTimeline) -> None:
    """One line per rank and phase: when it was busy, its seconds, events and bytes. | is the end of compute."""
    begun_at, ended_at = _bounds(timeline)
    column_s = (ended_at - begun_at) / COLUMNS
    end_of_compute = min(COLUMNS - 1, int((timeline.computed_at - begun_at) / column_s))
    for name, events in timeline.rows():
        cells = ["."] * COLUMNS
        cells[end_of_compute] = "|"
        for event in events:
            first, last = (int((moment - begun_at) / column_s) for moment in (event.begun_at, event.ended_at))
            cells[first : last + 1] = "#" * len(cells[first : last + 1])
        mib = sum(event.num_bytes for event in events) / 2**20
        told = f"{sum(map(seconds, events)) * 1e3:9.1f} ms {len(events):5} x" + (f" {mib:7.1f} MiB" if mib else "")
        print(f"{name:16}{''.join(cells)}{told}")
    print(
        f"{(ended_at - begun_at) * 1e3:.1f} ms in all, exposed {timeline.exposed_s * 1e3:.1f} ms "
        f"({timeline.least_exposed_s * 1e3:.1f} at least) of {timeline.wire_s * 1e3:.1f} ms on the wire: "
        f"{timeline.hidden_share:.1%} hidden"
    )


def plot_timelines(timelines: Sequence[tuple[str, HandoffTimeline]], path: Path) -> None:
    """Writes a PNG: one handoff above the other, by name, a row per rank and phase."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3 * len(timelines)), layout="constrained")
    for axes, (name, timeline) in zip(figure.subplots(len(timelines), 1, squeeze=False)[:, 0], timelines, strict=True):
        begun_at, _ = _bounds(timeline)
        rows = timeline.rows()
        for row, (_, events) in enumerate(rows):
            bars = [(event.begun_at - begun_at, seconds(event)) for event in events]
            axes.broken_barh(bars, (row - 0.4, 0.8), color=COLOURS[events[0].phase], edgecolor="white", linewidth=0.4)
        axes.axvline(timeline.computed_at - begun_at, color="tab:red", linestyle=":")
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.invert_yaxis()
        axes.set_title(f"{name}: {timeline.hidden_share:.1%} of {timeline.wire_s:.2f} s on the wire hidden")
        axes.set_xlabel("s; dotted: the end of prefill's compute")
    figure.savefig(path)


def _bounds(timeline: HandoffTimeline) -> tuple[float, float]:
    events = (*timeline.prefill, *timeline.decode)
    return min(event.begun_at for event in events), max(event.ended_at for event in events)
