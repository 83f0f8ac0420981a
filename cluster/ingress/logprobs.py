"""Log-probabilities in the two shapes that OpenAI's endpoints have for them."""

from collections.abc import Sequence
from typing import Any

from cluster.ingress.tokenizer import Tokenizer
from core.sampling import TokenLogprobs

_LEAST = -9999.0  # stands for minus infinity, which JSON lacks


def chat_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int
) -> dict[str, Any]:
    """`{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`, one entry per token."""
    content = [
        _entry(tokenizer, token_id, token.logprob)
        | {"top_logprobs": [_entry(tokenizer, *alternative) for alternative in token.top[:num_top]]}
        for token_id, token in zip(token_ids, logprobs, strict=True)
    ]
    return {"content": content}


def completion_logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs], num_top: int, offset: int
) -> dict[str, Any]:
    """`{"tokens", "token_logprobs", "top_logprobs", "text_offset"}`, parallel lists; offsets count from `offset`.

    The chosen token is among the top even when it is not one of the best.
    """
    tokens = [_unique_text(tokenizer, token_id) for token_id in token_ids]
    offsets = []
    for token_id in token_ids:
        offsets.append(offset)
        offset += len(tokenizer.token_text(token_id))
    top = [
        {_unique_text(tokenizer, other): max(logprob, _LEAST) for other, logprob in token.top[:num_top]}
        | {text: max(token.logprob, _LEAST)}
        for text, token in zip(tokens, logprobs, strict=True)
    ]
    chosen = [max(token.logprob, _LEAST) for token in logprobs]
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": top, "text_offset": offsets}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    text, raw = tokenizer.token_text(token_id), tokenizer.token_bytes(token_id)
    return {"token": text, "logprob": max(logprob, _LEAST), "bytes": list(raw)}


def _unique_text(tokenizer: Tokenizer, token_id: int) -> str:
    """The token's text; OpenAI's `bytes:\\xe3\\x81` for half a character, as texts are keys here."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
