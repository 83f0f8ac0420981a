"""A scripted backend, and a real HTTP server around the application."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

import httpx
import openai
import uvicorn

from cluster.ingress.app import build_app
from cluster.ingress.generation import FleetHealth, Generation, GenerationEvent
from cluster.ingress.served_model import ServedModel
from core.config import IngressConfig
from core.errors import PeerLost
from core.messages.to_decode import Phases
from core.messages.to_scheduler import Decisions, Explained, FleetStatus, Traffic
from core.sampling import TokenLogprobs

Script = Callable[[Generation], AsyncGenerator[GenerationEvent, None]]

PHASES = Phases(
    queue_s=0.25,
    prefill_s=0.5,
    transfer_s=0.125,
    exposed_transfer_s=0.0625,
    first_decode_s=0.03125,
    transfer_bytes=4096,
)


@dataclass
class ScriptedBackend:
    """Answers by `script`; records what was asked, and which generations were closed before their end."""

    script: Script
    health_now: FleetHealth = field(default_factory=lambda: FleetHealth(ready=True))
    fleet_now: FleetStatus | None = None
    decisions: tuple[Explained, ...] = ()
    seen: list[Generation] = field(default_factory=list)
    closed_early: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    async def generate(self, generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        self.seen.append(generation)
        events = self.script(generation)
        try:
            async for event in events:
                yield event
        except (GeneratorExit, asyncio.CancelledError):
            self.closed_early.append(generation.request_id)
            self.closed.set()
            raise
        finally:
            await events.aclose()

    async def health(self) -> FleetHealth:
        return self.health_now

    async def fleet(self) -> FleetStatus:
        if self.fleet_now is None:
            raise PeerLost("the scheduler is away")
        return self.fleet_now

    async def why(self, request_id: str) -> Decisions:
        return Decisions(tuple(one for one in self.decisions if one.request_id == request_id))

    async def set_traffic(self, weights: dict[str, float] | None) -> Traffic:
        return Traffic(7, weights or {})


def scripted_logprobs(generation: Generation, token_ids: Sequence[int]) -> tuple[TokenLogprobs, ...]:
    """-0.5 for the chosen token, which is the best; its successors in the vocabulary follow at -1.5, -2.5, ..."""
    num_top = generation.sampling.num_logprobs
    if num_top is None:
        return ()
    tops = [tuple(((t + i) % 300, -0.5 - i) for i in range(num_top)) for t in token_ids]
    return tuple(TokenLogprobs(-0.5, top) for top in tops)


def tokens_script(output: Sequence[int], tokens_per_event: int = 1, num_cached: int = 3) -> Script:
    """Gives `output`, then ends by "length" at max_tokens, or by "stop" with the first stop token met."""

    async def script(generation: Generation) -> AsyncGenerator[GenerationEvent, None]:
        sampling = generation.sampling
        token_ids = list(output[: sampling.max_tokens])
        stops = [i for i, token in enumerate(token_ids) if token in sampling.stop_token_ids]
        token_ids = token_ids[: stops[0] + 1] if stops else token_ids
        assert stops or len(token_ids) == sampling.max_tokens, "the script is too short"
        for start in range(0, len(token_ids), tokens_per_event):
            part = tuple(token_ids[start : start + tokens_per_event])
            last = start + tokens_per_event >= len(token_ids)
            yield GenerationEvent(
                part,
                scripted_logprobs(generation, part),
                ("stop" if stops else "length") if last else None,
                num_cached if start == 0 else None,
                PHASES if start == 0 else None,
                num_resumes=1 if last else 0,
            )
            await asyncio.sleep(0)

    return script


class Server:
    """An application behind uvicorn in a thread, on a free port."""

    def __init__(self, model: ServedModel, config: IngressConfig, backend: ScriptedBackend) -> None:
        self.backend = backend
        self.model = model
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = self._socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        app = build_app(config, model, backend)
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._uvicorn.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=config.api_key or "none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def answers(self, text: str, tokens_per_event: int = 1, end: bool = True) -> list[int]:
        """Scripts the backend to answer `text`; returns its token ids."""
        ids = self.model.tokenizer.encode([text], False)[0]
        self.backend.script = tokens_script(ids + [0] * end, tokens_per_event)
        return ids

    def metric(self, name: str) -> float:
        """A value of /metrics; `name` may have labels."""
        for line in self.http.get("/metrics").text.splitlines():
            if line.rsplit(" ", 1)[0] == name:
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Waits for the server's loop to do something; each try lets it take a turn."""
        for _ in range(2000):
            if condition():
                return
            self.http.get("/livez")
        raise AssertionError("it never came true")

    def wait_until_resting(self, counter: Callable[[], int]) -> None:
        """Waits until a counter moved, and then no more over 50 turns of the server's loop."""
        before = -1
        while counter() != before or before == 0:
            before = counter()
            for _ in range(50):
                self.http.get("/livez")

    def close(self) -> None:
        self.openai.close()
        self.http.close()
        self._uvicorn.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._socket.close()
