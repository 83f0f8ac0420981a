"""From a request to its choices: what each shall generate, and the text that comes of it."""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar, cast

from cluster.ingress.detokenizer import Detokenizer
from cluster.ingress.generation import Backend, Generation, GenerationEvent, GenerationReport
from cluster.ingress.metrics import GenerationMeter
from cluster.ingress.protocol import GenerationRequest
from cluster.ingress.request_scope import RequestRecord
from cluster.ingress.served_model import ServedModel
from cluster.ingress.stop_strings import StopStrings
from core.errors import InvalidParameter, PeerLost, PromptTooLong
from core.sampling import SamplingParams, TokenLogprobs

Item = TypeVar("Item")


@dataclass(frozen=True)
class Choice:
    """One sequence of an answer; choice `index` belongs to prompt `index // n`."""

    index: int
    generation: Generation
    stops: tuple[str, ...]


@dataclass(frozen=True)
class Delta:
    """What a choice gained: text that is safe to show, and the tokens it came from (the text may come later).

    `logprobs` is empty or as long as `token_ids`. Tokens after a stop string are dropped.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    num_cached_tokens: int | None = None
    report: GenerationReport | None = None


def plan_choices(
    model: ServedModel,
    request: GenerationRequest,
    prompts: Sequence[Sequence[int]],
    default_max_tokens: int | None,
    record: RequestRecord,
    timeout_s: float,
) -> list[Choice]:
    """Checks the prompts and makes every choice of the answer. Raises InvalidParameter and PromptTooLong."""
    _check_token_ids(model, prompts, request.stop_token_ids or ())
    stop_token_ids = frozenset(request.stop_token_ids or ())
    defaults = model.defaults
    standing = request.standing(record.tenant)
    choices: list[Choice] = []
    for prompt in prompts:
        max_tokens = _max_tokens(model, len(prompt), request.wanted_max_tokens, default_max_tokens)
        for number in range(request.num_choices):
            sampling = SamplingParams(
                max_tokens=max_tokens,
                temperature=defaults.temperature if request.temperature is None else request.temperature,
                top_p=defaults.top_p if request.top_p is None else request.top_p,
                top_k=max(0, defaults.top_k if request.top_k is None else request.top_k),
                seed=choice_seed(request.seed, number),
                stop_token_ids=stop_token_ids if request.ignore_eos else stop_token_ids | model.eos_token_ids,
                num_logprobs=request.num_logprobs,
            )
            index = len(choices)
            generation = Generation(
                f"{record.unique_id}-{index}",
                tuple(prompt),
                sampling,
                timeout_s,
                request.baton.placement,
                standing,
            )
            choices.append(Choice(index, generation, tuple(request.stop or ())))
    return choices


def choice_seed(seed: int | None, number: int) -> int:
    """Seed of the `number`-th choice of a prompt: the request's own for the first, derived from it for the others.

    It does not depend on the prompt's place in a list, so a list answers as its prompts would one by one.
    """
    if seed is None:
        return secrets.randbits(63)
    if number == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _check_token_ids(model: ServedModel, prompts: Sequence[Sequence[int]], stop_token_ids: Sequence[int]) -> None:
    for field, ids in (*(("prompt", prompt) for prompt in prompts), ("stop_token_ids", stop_token_ids)):
        if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
            raise InvalidParameter(f"{field!r} holds a token id outside 0..{model.vocab_size - 1}", field=field)


def _max_tokens(model: ServedModel, num_prompt: int, wanted: int | None, default: int | None) -> int:
    room = model.max_model_len - num_prompt
    if room < (wanted or 1):
        raise PromptTooLong(
            f"This model's maximum context length is {model.max_model_len} tokens. However, you requested "
            f"{num_prompt + (wanted or 1)} tokens ({num_prompt} in the prompt, {wanted or 1} in the completion).",
            field="max_tokens" if num_prompt < model.max_model_len else "prompt",
        )
    if num_prompt == 0:
        raise InvalidParameter("the prompt holds no tokens", field="prompt")
    return wanted if wanted is not None else min(room, default or room)


class TextStream:
    """Makes deltas of one choice's events: tokens to text, up to a stop string."""

    def __init__(self, index: int, detokenizer: Detokenizer, stops: StopStrings) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._stops = stops

    def take(self, event: GenerationEvent) -> Delta:
        """The delta that an event brings. The stop token that ends an output has no text."""
        num_texts = len(event.token_ids) - (event.finish_reason == "stop")
        text, num_taken, finish_reason = "", 0, event.finish_reason
        for token_id in event.token_ids:
            num_taken += 1
            if num_taken <= num_texts:
                text += self._stops.push(self._detokenizer.push(token_id))
            if self._stops.found:
                break
        if finish_reason is not None and not self._stops.found:
            text += self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        if self._stops.found:
            finish_reason = "stop"
        logprobs = event.logprobs[:num_taken]
        token_ids = event.token_ids[:num_taken]
        return Delta(self._index, text, token_ids, logprobs, finish_reason, event.num_cached_tokens, event.report)


async def run_choice(
    backend: Backend, model: ServedModel, choice: Choice, meter: GenerationMeter
) -> AsyncGenerator[Delta, None]:
    """Generates one choice. Leaving it early, by `aclose` or a stop string, cancels the generation."""
    prompt = choice.generation.prompt_token_ids
    stream = TextStream(choice.index, model.tokenizer.detokenizer(prompt), StopStrings(choice.stops))
    events = cast(AsyncGenerator[GenerationEvent, None], backend.generate(choice.generation))
    with meter.running():
        async with aclosing(events):
            async for event in events:
                delta = stream.take(event)
                meter.observe(event, len(delta.token_ids), len(prompt))
                yield delta
                if delta.finish_reason is not None:
                    return
    raise PeerLost("the generation ended without a finish reason")


async def interleave(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """Items of all streams as they come; at most one per stream is taken ahead of the consumer.

    The first error ends all streams and is raised. Closing this generator closes them, too, before it returns.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[Item | Exception | None] = asyncio.Queue(maxsize=1)
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        num_open = len(pumps)
        while num_open:
            received = await queue.get()
            if isinstance(received, Exception):
                raise received
            if received is None:
                num_open -= 1
            else:
                yield received
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncGenerator[Item, None], queue: "asyncio.Queue[Item | Exception | None]") -> None:
    async with aclosing(stream):
        try:
            async for item in stream:
                await queue.put(item)
            await queue.put(None)
        except Exception as error:  # carried to the consumer, which raises it
            await queue.put(error)
