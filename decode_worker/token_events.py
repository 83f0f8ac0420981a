"""What an ingress is told about its request while that is on decode. Pure."""

from core.messages.to_decode import TokenEvent
from decode_worker.handoff import Handoff
from decode_worker.scheduler import Outcome


def joined(handoff: Handoff) -> TokenEvent:
    """It is in the batch: the next token comes from decode."""
    return TokenEvent(*handoff.key, handoff.sequence.num_outputs, ())


def resume(handoff: Handoff) -> TokenEvent:
    """Its rest is to be planned anew, with the tokens shown so far."""
    return TokenEvent(*handoff.key, handoff.sequence.num_outputs, (), finish_reason="resume")


def advanced(handoff: Handoff, outcome: Outcome, *, is_first: bool) -> TokenEvent:
    """A token, an end, or both; the first event of an attempt also tells where the time went until then."""
    return TokenEvent(
        *handoff.key,
        outcome.first_index,
        (outcome.token_id,) if outcome.token_id is not None else (),
        (outcome.logprobs,) if outcome.logprobs is not None else (),
        outcome.finish_reason,
        num_cached_tokens=handoff.sequence.num_cached if is_first and handoff.source is None else None,
        phases=handoff.phases() if is_first else None,
    )
