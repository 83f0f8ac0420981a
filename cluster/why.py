"""What `baton why` prints: what a decision weighed, what it foresaw, and what came."""

from typing import Any
from urllib.parse import quote

from rich.console import Console

from cluster.http_client import ask
from core.errors import InvalidParameter

_TERMS = ("queue_s", "pull_s", "restore_s", "prefill_s", "transfer_s", "wait_s")
_OTHERS = ("evict_s", "work_s", "strain_s")  # what counts beside TTFT
_UNTIL_FIRST_TOKEN = _TERMS[:4]


def fetch_why(url: str, request_id: str, api_key: str = "") -> dict[str, Any]:
    """The answer of `/v1/requests/{id}/why`. Raises NoReplica, Unauthorized, RequestNotFound, InvalidParameter."""
    if not request_id:
        raise InvalidParameter("the id of a request is asked, and it is empty", field="request_id")
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
        f"waited {_ms(decision['queue_s'])} ms for the plan; milliseconds:"
    )
    for number, candidate in enumerate(decision["candidates"]):
        console.print(f"  {'[bold]taken[/bold]' if number == 0 else 'or   '}  {_way(candidate)}", soft_wrap=True)
    chosen = decision["candidates"][0]
    foreseen_s = sum(chosen[term] for term in _UNTIL_FIRST_TOKEN)
    handoff_s = chosen["transfer_s"] + chosen["wait_s"] + chosen["itl_s"]  # the last: decode's first step
    handoff = f"{_ms(handoff_s)} ms foreseen, {_ms(decision['actual_handoff_s'])} came"
    console.print(
        f"first token: {_ms(foreseen_s)} ms foreseen, {_ms(decision['actual_first_token_s'])} came; "
        + (f"handoff and decode's first token: {handoff}; " if chosen["prefill_id"] else "")
        + f"ITL after that: {_ms(chosen['itl_s'])} ms foreseen, {_ms(decision['actual_itl_s'])} came; "
        f"cached tokens found: {_known(decision['actual_cached_tokens'])}; "
        f"output tokens: {_known(decision['actual_output_tokens'])}"
        + ("" if decision["is_over"] else "; still under way")
    )


def _way(candidate: dict[str, Any]) -> str:
    """One way in a sentence: terms that are nothing are left out."""
    pulled = f", prefix from {candidate['lender_id']}" if candidate["lender_id"] else ""
    route = " -> ".join(filter(None, (candidate["prefill_id"], candidate["decode_id"])))
    terms = [f"{term.removesuffix('_s')} {_ms(candidate[term])}" for term in _TERMS if candidate[term]]
    total = " = ".join(filter(None, (_ms(sum(candidate[term] for term in _TERMS)), " + ".join(terms))))
    others = "".join(f"; {term.removesuffix('_s')} {_ms(candidate[term])}" for term in _OTHERS if candidate.get(term))
    return f"{candidate['reason']}, {route}{pulled}: TTFT {total}; ITL {_ms(candidate['itl_s'])}{others}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.1f}"


def _known(number: int | None) -> str:
    return "-" if number is None else str(number)
