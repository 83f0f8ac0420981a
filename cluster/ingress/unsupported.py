"""Parameters of OpenAI's and vLLM's APIs that are known here and cannot be honoured, or change nothing."""

from collections.abc import Mapping
from typing import Any

from core.errors import InvalidParameter

# Who asks and how to bill or cache: no effect on the answer.
_NO_EFFECT = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})

# Field -> the values that ask for nothing; any other value is refused. None is always harmless.
_HARMLESS_IN_REQUEST: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "audio": (),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "store": (False,),
    "moderation": (),
    "web_search_options": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
}

_HARMLESS_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],),
    "tool_call_id": (),
    "function_call": (),
    "refusal": ("",),
    "audio": (),
    "annotations": ([],),
    "reasoning_content": ("",),
    "reasoning": ("",),
}


def request_without_unsupported(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A request body less the fields that ask for nothing. Raises InvalidParameter naming one that cannot be had."""
    kept = {key: value for key, value in tree.items() if key not in _NO_EFFECT}
    return _drop(kept, _HARMLESS_IN_REQUEST, "")


def message_without_unsupported(tree: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The same for `messages[index]`, such as an earlier answer that is sent back as part of the conversation."""
    return _drop(tree, _HARMLESS_IN_MESSAGE, f"messages.{index}.")


def _drop(tree: Mapping[str, Any], harmless: Mapping[str, tuple[Any, ...]], prefix: str) -> dict[str, Any]:
    for key in tree.keys() & harmless.keys():
        if tree[key] is not None and tree[key] not in harmless[key]:
            raise InvalidParameter(f"{prefix + key!r} is not supported by this server", field=prefix + key)
    return {key: value for key, value in tree.items() if key not in harmless}
