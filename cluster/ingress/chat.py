"""POST /v1/chat/completions."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from cluster.ingress.answer import Edge, Output, answer
from cluster.ingress.choices import Delta, plan_choices
from cluster.ingress.logprobs import chat_logprobs
from cluster.ingress.protocol import ChatRequest
from cluster.ingress.request_scope import RequestRecord
from cluster.ingress.served_model import ServedModel
from core.errors import InvalidParameter
from core.sampling import TokenLogprobs


async def chat(edge: Edge, http: Request, request: ChatRequest) -> Response:
    """Answers a parsed request. Raises BatonError."""
    record: RequestRecord = http.state.record
    model = await edge.served_model()
    prompt = await asyncio.to_thread(_prompt_token_ids, model, request)
    default = model.defaults.max_tokens
    choices = plan_choices(model, request, [prompt], default, record, edge.config.request_timeout_s)
    return await answer(edge, http, request, choices, ChatShape(model, request, prompt, record.unique_id))


def _prompt_token_ids(model: ServedModel, request: ChatRequest) -> list[int]:
    """The rendered conversation; its special tokens are the template's, unless the client asks for more."""
    messages = [message.for_template() for message in request.messages]
    text = model.tokenizer.render_chat(messages, request.chat_template_kwargs or {})
    try:
        return model.tokenizer.encode([text], request.add_special_tokens is True)[0]
    except UnicodeEncodeError as error:
        raise InvalidParameter("the messages are not valid Unicode text", field="messages") from error


class ChatShape:
    """The chat completion object and its chunks: first the role, then content, and with the last the reason."""

    def __init__(self, model: ServedModel, request: ChatRequest, prompt: Sequence[int], unique_id: str) -> None:
        self._model = model
        self._request = request
        self._prompt = prompt
        self._id = f"chatcmpl-{unique_id}"
        self._seen: set[int] = set()  # choices that have begun
        self._created = int(time.time())

    def identity(self, streamed: bool) -> dict[str, Any]:  # noqa: D102
        kind = "chat.completion.chunk" if streamed else "chat.completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:  # noqa: D102
        chunks = []
        if delta.index not in self._seen:
            self._seen.add(delta.index)
            role = {"role": "assistant", "content": ""}
            opening = {"index": delta.index, "delta": role, "logprobs": None, "finish_reason": None}
            chunks.append({"choices": [opening]} | self._prompt_field())
        wants_tokens = self._request.return_token_ids or self._request.logprobs
        if delta.text or delta.finish_reason is not None or (wants_tokens and delta.token_ids):
            content = {"content": delta.text} if delta.text or wants_tokens else {}
            chunks.append({"choices": [self._choice(delta, "delta", content, delta.token_ids, delta.logprobs)]})
        return chunks

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:  # noqa: D102
        choices = [
            self._choice(
                output, "message", {"role": "assistant", "content": output.text}, output.token_ids, output.logprobs
            )
            for output in outputs
        ]
        return {"choices": choices} | self._prompt_field()

    def _choice(
        self,
        of: Delta | Output,
        key: str,
        content: dict[str, str],
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs],
    ) -> dict[str, Any]:
        num_top = self._request.num_logprobs
        shaped = None if num_top is None else chat_logprobs(self._model.tokenizer, token_ids, logprobs, num_top)
        choice = {"index": of.index, key: content, "logprobs": shaped, "finish_reason": of.finish_reason}
        return choice | ({"token_ids": list(token_ids)} if self._request.return_token_ids else {})

    def _prompt_field(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self._prompt)} if self._request.return_token_ids else {}
