"""POST /v1/completions."""

import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from cluster.ingress.answer import Edge, Output, answer
from cluster.ingress.choices import Choice, Delta, plan_choices
from cluster.ingress.logprobs import completion_logprobs
from cluster.ingress.protocol import CompletionRequest
from cluster.ingress.request_scope import RequestRecord
from cluster.ingress.served_model import ServedModel
from core.errors import InvalidParameter
from core.sampling import TokenLogprobs

DEFAULT_MAX_TOKENS = 16  # OpenAI's


async def complete(edge: Edge, http: Request, request: CompletionRequest) -> Response:
    """Answers a parsed request. Raises BatonError."""
    record: RequestRecord = http.state.record
    model = await edge.served_model()
    prompts = await _prompt_token_ids(model, request)
    choices = plan_choices(model, request, prompts, DEFAULT_MAX_TOKENS, record, edge.config.request_timeout_s)
    return await answer(edge, http, request, choices, CompletionShape(model, request, choices, record.unique_id))


async def _prompt_token_ids(model: ServedModel, request: CompletionRequest) -> list[list[int]]:
    if not isinstance(request.prompt[0], str):
        return request.prompt
    texts = request.prompt
    try:
        return await model.tokenizer.encode_in_thread(texts, request.add_special_tokens is not False)
    except UnicodeEncodeError as error:
        raise InvalidParameter("the prompt is not valid Unicode text", field="prompt") from error


class CompletionShape:
    """The legacy completion object; chunks and whole answer look alike."""

    def __init__(
        self, model: ServedModel, request: CompletionRequest, choices: Sequence[Choice], unique_id: str
    ) -> None:
        self._model = model
        self._request = request
        self._choices = choices
        self._id = f"cmpl-{unique_id}"
        self._seen: set[int] = set()  # choices that have begun
        self._offsets = {choice.index: len(self._echo(choice.index)) for choice in choices}
        self._created = int(time.time())

    def identity(self, streamed: bool) -> dict[str, Any]:  # noqa: ARG002, D102
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model.name}

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:  # noqa: D102
        first = delta.index not in self._seen
        self._seen.add(delta.index)
        text = (self._echo(delta.index) if first else "") + delta.text
        wants_tokens = self._request.return_token_ids or self._request.logprobs is not None
        if not text and delta.finish_reason is None and not (wants_tokens and delta.token_ids):
            return []
        return [{"choices": [self._choice(delta, text, delta.token_ids, delta.logprobs, first)]}]

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:  # noqa: D102
        choices = [
            self._choice(output, self._echo(output.index) + output.text, output.token_ids, output.logprobs, True)
            for output in outputs
        ]
        return {"choices": choices}

    def _choice(
        self,
        of: Delta | Output,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
        with_prompt: bool,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": of.index,
            "text": text,
            "logprobs": self._logprobs(of.index, token_ids, logprobs),
            "finish_reason": of.finish_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = list(token_ids)
            if with_prompt:
                choice["prompt_token_ids"] = list(self._choices[of.index].generation.prompt_token_ids)
        return choice

    def _logprobs(
        self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        num_top = self._request.logprobs
        if num_top is None:
            return None
        tokenizer = self._model.tokenizer
        shaped = completion_logprobs(tokenizer, token_ids, logprobs, num_top, self._offsets[index])
        self._offsets[index] += sum(len(tokenizer.token_text(token_id)) for token_id in token_ids)
        return shaped

    def _echo(self, index: int) -> str:
        if not self._request.echo:
            return ""
        prompt = self._request.prompt[index // self._request.num_choices]
        return prompt if isinstance(prompt, str) else self._model.tokenizer.decode(prompt)
