"""Turns of one agent: what the model said is where the next prompt goes on from the one before. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from simulator.traces.trace import Run, TracedRequest, split_at


@dataclass(frozen=True)
class Turn:
    """A request whose output is not known yet."""

    request: TracedRequest
    blocks: tuple[Run, ...]  # of its prompt, by which prompts are compared
    num_cached_tokens: int | None = None  # of its prompt, when it was recorded; None: nobody knows


def with_outputs(turns: Sequence[Turn]) -> list[TracedRequest]:
    """The tail of a prompt and its output are known from the next prompt, if that goes on from it."""
    done: list[TracedRequest] = []
    following: Turn | None = None
    for turn in reversed(turns):  # so that a next prompt has its own tail already
        if following is not None and _goes_on(turn, following):
            turn = replace(turn, request=_continued(turn, following))
        done.append(turn.request)
        following = turn
    return done[::-1]


def _goes_on(turn: Turn, following: Turn) -> bool:
    num_before = turn.request.num_prompt_tokens + turn.request.num_output_tokens
    begins = split_at(following.blocks, _num_tokens(turn.blocks))[0]
    return _joined(begins) == _joined(turn.blocks) and following.request.num_prompt_tokens >= num_before


def _continued(turn: Turn, following: Turn) -> TracedRequest:
    request = turn.request
    prompt, rest = split_at(following.request.prompt, request.num_prompt_tokens)
    num_said = _num_said(turn, following)
    output, _ = split_at(rest, num_said)
    left_out, _ = split_at(request.output, request.num_output_tokens - num_said)
    return replace(request, prompt=prompt, output=(*output, *left_out))


def _num_said(turn: Turn, following: Turn) -> int:
    """How much of an output the next prompt repeats: all, or what was found cached beyond the prompt before.

    Thoughts are left out of a history, calls of tools are written anew. A cache that had lost part of the prompt
    before says nothing of its output.
    """
    request, num_cached = turn.request, following.num_cached_tokens
    if num_cached is None or num_cached < _num_tokens(turn.blocks):
        return request.num_output_tokens
    return min(request.num_output_tokens, max(0, num_cached - request.num_prompt_tokens))


def _num_tokens(runs: Iterable[Run]) -> int:
    return sum(run.num_tokens for run in runs)


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Runs that go on from one another as one."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1].length == run.length and found[-1].first + found[-1].number == run.first:
            found[-1] = found[-1]._replace(number=found[-1].number + run.number)
        else:
            found.append(run)
    return found
