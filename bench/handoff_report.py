"""What bench.handoff tells of the requests that it saw: medians, ratios, a table."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.report import milliseconds, print_table
from core.messages.to_decode import Phases


@dataclass(frozen=True)
class Seen:
    """One request as its ingress saw it, in seconds from its start."""

    first_token_s: float
    second_token_s: float
    itl_s: float  # median, from the second token on
    phases: Phases


@dataclass(frozen=True)
class Line:
    """Medians of one prompt length and placement."""

    num_prompt_tokens: int
    placement: str
    first_token_s: float
    second_token_s: float
    itl_s: float
    transfer_bytes: int
    transfer_bytes_per_s: float | None  # from the first announcement on: includes waiting for layers to be computed
    exposed_transfer_s: float | None
    second_token_bound_s: float | None

    @property
    def ratio_to_bound(self) -> float | None:
        """Of the second token; 1 is a handoff that costs nothing but the last copy."""
        return self.second_token_s / self.second_token_bound_s if self.second_token_bound_s else None


def summarise(length: int, placement: str, seen: Sequence[Seen], bound_s: float | None) -> Line:
    """Medians."""
    is_pair = placement == "pair"
    return Line(
        length,
        placement,
        statistics.median(one.first_token_s for one in seen),
        statistics.median(one.second_token_s for one in seen),
        statistics.median(one.itl_s for one in seen),
        seen[0].phases.transfer_bytes,
        statistics.median(one.phases.transfer_bytes / one.phases.fetching_s for one in seen) if is_pair else None,
        statistics.median(one.phases.exposed_transfer_s for one in seen) if is_pair else None,
        bound_s,
    )


def compare(lines: Sequence[Line]) -> dict[int, dict[str, float]]:
    """Pair over local, by prompt length."""
    by_key = {(line.num_prompt_tokens, line.placement): line for line in lines}
    ratios = {}
    for length in sorted({line.num_prompt_tokens for line in lines}):
        pair, local = by_key[length, "pair"], by_key[length, "local"]
        ratios[length] = {
            "first_token": round(pair.first_token_s / local.first_token_s, 3),
            "second_token": round(pair.second_token_s / local.second_token_s, 3),
            "itl": round(pair.itl_s / local.itl_s, 3),
        }
    return ratios


def print_lines(lines: Sequence[Line]) -> None:
    """Milliseconds, MiB and GB/s."""
    head = (
        "prompt",
        "placement",
        "1st token ms",
        "2nd token ms",
        "ITL ms",
        "MiB",
        "GB/s *",
        "exposed ms",
        "2nd / bound",
    )
    print_table(
        head,
        [
            (
                str(line.num_prompt_tokens),
                line.placement,
                milliseconds(line.first_token_s),
                milliseconds(line.second_token_s),
                milliseconds(line.itl_s),
                f"{line.transfer_bytes / 2**20:.1f}" if line.transfer_bytes else "-",
                f"{line.transfer_bytes_per_s / 1e9:.2f}" if line.transfer_bytes_per_s is not None else "-",
                milliseconds(line.exposed_transfer_s) if line.exposed_transfer_s is not None else "-",
                f"{line.ratio_to_bound:.2f}" if line.ratio_to_bound is not None else "-",
            )
            for line in lines
        ],
    )
    print("* bytes over the seconds of the fetches themselves, whether hidden behind the prefill or not")
