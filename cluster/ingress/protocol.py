"""Request bodies of the OpenAI protocol: types, bounds, and an error message that names field and limit."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import from_json

from cluster.ingress.generation import Standing
from cluster.ingress.unsupported import message_without_unsupported, request_without_unsupported
from core.errors import InvalidParameter
from core.slo_config import SloClass

MAX_CHOICES = 16
MAX_PROMPTS = 128
MAX_STOPS = 16
MAX_LOGPROBS = 20

StopString = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """Base of all bodies: no coercion, no unknown field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Body):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # as vLLM: usage so far in every chunk
    include_obfuscation: Literal[False] | None = None


class SloOptions(Body):
    """What a request expects, in milliseconds; None: that of its class."""

    ttft_ms: Annotated[float, Field(gt=0, le=3.6e6, strict=False)] | None = None
    itl_ms: Annotated[float, Field(gt=0, le=3.6e6, strict=False)] | None = None


class BatonOptions(Body):
    """What only this server understands: where a request shall run, when, and whether to tell where it did."""

    placement: Literal["auto", "pair", "local"] = "auto"
    explain: bool = False  # the answer ends with a `baton` object: placement, replicas, phases
    slo_class: SloClass | None = None  # None: as `service_tier` says
    slo: SloOptions = SloOptions()
    priority: int = Field(default=0, ge=-100, le=100)  # among the requests of one tenant; higher ones go first


class GenerationRequest(Body):
    """What both endpoints understand. None means: the model's default."""

    model: str
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1)  # -1 and 0: off
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: list[StopString] | None = Field(default=None, max_length=MAX_STOPS)
    stop_token_ids: list[int] | None = Field(default=None, max_length=128)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    service_tier: Literal["auto", "default", "flex", "priority"] | None = None
    baton: BatonOptions = BatonOptions()

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only allowed when 'stream' is true")
        return self

    def standing(self, tenant: str) -> Standing:
        """What a tenant's request expects. OpenAI's tiers are classes: flex is batch work, priority interactive."""
        tiers = {"flex": "batch", "priority": "interactive"}
        options = self.baton
        return Standing(
            tenant,
            options.slo_class or tiers.get(self.service_tier or "", "standard"),
            (options.slo.ttft_ms or 0.0) / 1000,
            (options.slo.itl_ms or 0.0) / 1000,
            options.priority,
        )

    @property
    def num_choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted per token; None for no logprobs."""
        raise AssertionError("each endpoint spells logprobs its own way")

    @property
    def wanted_max_tokens(self) -> int | None:
        """The limit of output tokens that the client set."""
        return self.max_tokens


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt` becomes a list of texts or of token lists."""

    prompt: list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> list[str] | list[list[int]]:
        prompts = [value] if isinstance(value, str) or _is_list_of(value, int) else value
        if not isinstance(prompts, list) or not prompts:
            raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
        if len(prompts) > MAX_PROMPTS:
            raise ValueError(f"holds {len(prompts)} prompts; at most {MAX_PROMPTS} are allowed")
        if not _is_list_of(prompts, str) and not all(_is_list_of(prompt, int) for prompt in prompts):
            raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists")
        if not all(prompts):
            raise ValueError("must not be empty")
        return prompts

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> "CompletionRequest":
        if self.echo and self.logprobs is not None:
            raise ValueError("'echo' together with 'logprobs' is not supported: prompts have no logprobs here")
        return self

    @property
    def num_logprobs(self) -> int | None:  # noqa: D102
        return self.logprobs


class Message(Body):
    """One turn of a conversation; text parts are joined by newlines."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None

    @field_validator("content", mode="plain")
    @classmethod
    def _text(cls, value: Any) -> str:
        if value is None or isinstance(value, str):
            return value or ""
        if not isinstance(value, list):
            raise ValueError("must be a string or a list of text parts")
        for part in value:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"may hold text parts only, not {kind!r}")
        return "\n".join(part["text"] for part in value)

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it. They know no developer; OpenAI defines it as the newer word for system."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.content} | ({"name": self.name} if self.name else {})


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)  # the newer name of max_tokens; wins over it
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: dict[str, Any] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _without_unsupported(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [message_without_unsupported(m, i) if isinstance(m, dict) else m for i, m in enumerate(value)]

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' is only allowed when 'logprobs' is true")
        return self

    @property
    def num_logprobs(self) -> int | None:  # noqa: D102
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wanted_max_tokens(self) -> int | None:  # noqa: D102
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class TrafficRequest(Body):
    """PUT /fleet/traffic. `weights` null returns to those before the last change."""

    weights: dict[str, Annotated[float, Field(ge=0, le=1e6, strict=False)]] | None


RequestT = TypeVar("RequestT", bound=Body)
GenerationT = TypeVar("GenerationT", bound=GenerationRequest)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """Reads a request body. Raises InvalidParameter naming the first field at fault."""
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidParameter(f"the body is not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise InvalidParameter("the body must be a JSON object")
    try:
        return kind.model_validate(request_without_unsupported(tree))
    except ValidationError as error:
        raise _from_validation(error) from error


def _from_validation(error: ValidationError) -> InvalidParameter:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return InvalidParameter(f"Unrecognized request argument supplied: {field}", field=field)
    if first["type"] == "missing":
        return InvalidParameter(f"you must provide {field!r}", field=field)
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
        return InvalidParameter(f"{field!r} {message}" if field else message, field=field or message.split("'")[1])
    return InvalidParameter(f"{field!r}: {first['msg']}", field=field)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is kind for item in value)
