"""What `baton why` prints: what a decision weighed, what it foresaw, and what came."""

from typing import Any
from urllib.parse import quote

from rich.console import Console
from rich.table import Table

from cluster.http_client import ask

_TERMS = ("queue_s", "pull_s", "restore_s", "prefill_s", "transfer_s", "wait_s")
_UNTIL_FIRST_TOKEN = _TERMS[:4]


def fetch_why(url: str, request_id: str, api_key: str = "") -> dict[str, Any]:
    """The answer of `/v1/requests/{id}/why`. Raises NoReplica, Unauthorized, RequestNotFound."""
    return ask("GET", f"{url}/v1/requests/{quote(request_id, safe='')}/why", api_key)


def print_why(why: dict[str, Any], console: Console) -> None:
    """One block per decision, the oldest first."""
    for decision in why["decisions"]:
        _print_decision(decision, console)


def _print_decision(decision: dict[str, Any], console: Console) -> None:
    tenant = f", tenant {decision['tenant']}" if decision["tenant"] else ""
    console.print(
        f"[bold]{decision['request_id']}[/bold], attempt {decision['attempt']}: {decision['slo_class']}{tenant}; "
        f"{decision['num_tokens']} prompt tokens, {decision['num_cached_tokens']} of them counted on as cached, "
        f"{decision['num_expected_tokens']:.0f} output tokens expected of {decision['max_new_tokens']} at most; "
        f"waited {_ms(decision['queue_s'])} ms for the plan"
    )
    console.print(_candidates(decision["candidates"]))
    chosen = decision["candidates"][0]
    foreseen_s = sum(chosen[term] for term in _UNTIL_FIRST_TOKEN)
    console.print(
        f"first token: {_ms(foreseen_s)} ms foreseen, {_ms(decision['actual_first_token_s'])} came; "
        f"ITL: {_ms(chosen['itl_s'])} ms foreseen, {_ms(decision['actual_itl_s'])} came; "
        f"cached tokens found: {_known(decision['actual_cached_tokens'])}; "
        f"output tokens: {_known(decision['actual_output_tokens'])}"
        + ("" if decision["is_over"] else "; still under way")
    )


def _candidates(candidates: list[dict[str, Any]]) -> Table:
    table = Table("", "prefill", "decode", "pulls from", "reason", title="milliseconds", title_justify="left")
    for term in (*_TERMS, "TTFT", "ITL"):
        table.add_column(term.removesuffix("_s"), justify="right")
    for number, candidate in enumerate(candidates):
        table.add_row(
            "taken" if number == 0 else "",
            candidate["prefill_id"] or "-",
            candidate["decode_id"],
            candidate["lender_id"] or "-",
            candidate["reason"],
            *(_ms(candidate[term]) for term in _TERMS),
            _ms(sum(candidate[term] for term in _TERMS)),
            _ms(candidate["itl_s"]),
        )
    return table


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _known(number: int | None) -> str:
    return "-" if number is None else str(number)
