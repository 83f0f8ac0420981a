"""`baton chat`: a conversation with a running server, streamed."""

import json
from collections.abc import Iterator

import httpx
from rich.console import Console

from core.errors import NoReplica, RequestError


def converse(url: str, system: str, max_tokens: int, api_key: str, console: Console) -> None:
    """Reads lines, streams answers. Raises NoReplica when nobody serves at `url`."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    messages = [{"role": "system", "content": system}] if system else []
    with httpx.Client(base_url=url, headers=headers, timeout=600, trust_env=False) as client:
        model = served_model(client)
        console.print(f"[dim]{model} at {url}; Ctrl-D ends[/dim]")
        while True:
            try:
                line = console.input("[bold]you:[/bold] ")
            except (EOFError, KeyboardInterrupt):
                return
            messages.append({"role": "user", "content": line})
            console.print("[bold]model:[/bold] ", end="")
            answer = ""
            for piece in stream_chat(client, model, messages, max_tokens):
                console.print(piece, end="", markup=False)
                answer += piece
            console.print()
            messages.append({"role": "assistant", "content": answer})


def served_model(client: httpx.Client) -> str:
    """The id of the model that a server offers."""
    try:
        answer = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise NoReplica(f"no server answers at {client.base_url}: {error}; start one with `baton serve`") from error
    if answer.status_code != 200:
        raise RequestError(answer.json()["error"]["message"])
    return str(answer.json()["data"][0]["id"])


def stream_chat(client: httpx.Client, model: str, messages: list[dict[str, str]], max_tokens: int) -> Iterator[str]:
    """Pieces of text of one answer. Raises RequestError with the server's message."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RequestError(json.loads(answer.read())["error"]["message"])
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                event = json.loads(line[6:])
                if "error" in event:
                    raise RequestError(event["error"]["message"])
                yield from (c["delta"].get("content") or "" for c in event["choices"])
