"""The model's tokenizer: prompts to ids, chat messages to prompts, single tokens to text and bytes."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from cluster.ingress.detokenizer import Detokenizer
from core.errors import ConfigurationError, InvalidParameter

_CONTEXT_TOKENS = 6  # of the prompt, decoded along with the first output token
_RESERVED_TEMPLATE_KEYS = frozenset(
    {"conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"}
    | {"tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs", "messages"}
)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable bytes stand for themselves, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Wraps a fast Hugging Face tokenizer. Safe to use from several threads."""

    def __init__(self, hugging_face: Any) -> None:
        self._hugging_face = hugging_face
        self._rust = hugging_face.backend_tokenizer
        added = self._rust.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._byte_level = '"ByteLevel"' in json.dumps(json.loads(self._rust.to_str())["decoder"])
        self._alphabet = _byte_alphabet()
        self._cached_token_bytes = lru_cache(maxsize=1 << 16)(self._token_bytes)
        self.eos_token_id: int | None = hugging_face.eos_token_id
        self.has_chat_template = hugging_face.chat_template is not None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        size: int = self._rust.get_vocab_size(with_added_tokens=True)
        return max(size, max(self._added, default=-1) + 1)

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text."""
        encodings = self._rust.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    async def encode_in_thread(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """As `encode`, without stopping the event loop."""
        return await asyncio.to_thread(self.encode, texts, add_special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the tokens, special ones left out."""
        return str(self._rust.decode(token_ids, skip_special_tokens=True))

    def detokenizer(self, prompt_token_ids: Sequence[int] = ()) -> Detokenizer:
        """An incremental decoder of the output that follows a prompt."""
        return Detokenizer(self.decode, self._special_ids, prompt_token_ids[-_CONTEXT_TOKENS:])

    def render_chat(self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any]) -> str:
        """The prompt of a conversation by the model's template, ready for the assistant's turn.

        Raises InvalidParameter when there is no template or it refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidParameter("this model has no chat template; use /v1/completions", field="messages")
        if reserved := sorted(_RESERVED_TEMPLATE_KEYS & arguments.keys()):
            raise InvalidParameter(f"{reserved[0]!r} cannot be set", field="chat_template_kwargs")
        try:
            rendered = self._hugging_face.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True, **arguments
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidParameter(f"the chat template refused the messages: {error}", field="messages") from error
        return str(rendered)

    def token_text(self, token_id: int) -> str:
        """The token alone as text, with replacement characters for incomplete bytes."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that the token stands for, possibly half a character; empty for an unknown id."""
        return self._cached_token_bytes(token_id)

    def _token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            content: str = self._added[token_id]
            return content.encode()
        token: str | None = self._rust.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(character in self._alphabet for character in token):
            return bytes(self._alphabet[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads tokenizer.json of a local checkpoint folder, never the network. Raises ConfigurationError.

    The generic class takes that file as it is. The one that AutoTokenizer would choose may build its own from the
    vocabulary, and brings torch along: 5 seconds and 300 MB more for every ingress.
    """
    if not (folder / "tokenizer.json").exists():
        raise ConfigurationError(f"{folder} has no fast tokenizer (tokenizer.json)")
    try:
        hugging_face = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot load the tokenizer of {folder}: {error}") from error
    return Tokenizer(hugging_face)
