"""The application on Ray Serve, over real HTTP with the official client: answers, failures under load, scale-down.

One fleet serves all tests of this file: two prefill replicas of two pipeline stages, two decode replicas at tensor
parallel 2.
"""

import asyncio
import os
import signal

import httpx
import openai
import psutil
import pytest

from cluster.local import free_port, local_fleet
from cluster.scaling import resize_pool
from cluster.settings import DEMO_MODEL_NAME, demo_model_path
from core.config import parse_config
from core.messages.fleet import Drain, Role
from core.security import Security
from rpc.client import RpcClient
from rpc.methods import DRAIN
from tests.cluster.live_fleet import NUM_TOKENS, PROMPTS, Load, Oracle, client_of, pool_states, stream_tokens

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]
SECRET = "of this fleet"


@pytest.fixture(scope="module")
def oracle():
    return Oracle.load()


@pytest.fixture(scope="module")
def expected(oracle):
    return [oracle.tokens(prompt, NUM_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    config = parse_config(
        {
            "model": {"path": str(demo_model_path()), "name": DEMO_MODEL_NAME, "dtype": "float32"},
            "prefill": {
                "min_replicas": 2, "max_replicas": 2, "num_blocks": 256, "pipeline_parallel": 2, "drain_timeout_s": 5,
            },
            "decode": {
                "min_replicas": 2, "max_replicas": 2, "num_blocks": 256, "tensor_parallel": 2, "drain_timeout_s": 0,
            },
            "scheduler": {"local_prefill_max_tokens": 64},
            "ingress": {"port": free_port(), "request_timeout_s": 120},
            "cluster": {"log_dir": str(tmp_path_factory.mktemp("logs")), "secret": SECRET},
        }
    )  # fmt: skip
    with local_fleet(config, lambda _: None) as fleet:
        yield fleet
    left = [p for p in psutil.Process().children(recursive=True) if p.pid not in before and p.is_running()]
    assert not [p for p in left if "ray" in p.name() or "haproxy" in p.name()], left


def resumes_of(fleet) -> float:
    return metric_of(fleet, "baton_resumes_total")


def metric_of(fleet, name: str) -> float:
    text = httpx.get(f"{fleet.url}/metrics", trust_env=False, timeout=10).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


async def until_degraded_is_over(fleet, num_pools: int = 2) -> None:
    from ray import serve

    async with asyncio.timeout(120), httpx.AsyncClient(trust_env=False, timeout=10) as http:
        while True:
            apps = serve.status().applications
            answer = await http.get(f"{fleet.url}/readyz")
            if (
                all(app.status.value == "RUNNING" for app in apps.values())
                and answer.status_code == 200
                and not answer.json()["degraded"]
            ):
                return
            await asyncio.sleep(0.2)


@pytest.mark.parametrize("placement", ["pair", "local"])
async def test_streamed_tokens_are_those_of_transformers(fleet, expected, placement):
    client = client_of(fleet)
    before = metric_of(fleet, "baton_transfer_bytes_total")
    streams = [stream_tokens(client, prompt, baton={"placement": placement}) for prompt in PROMPTS]
    assert await asyncio.gather(*streams) == expected
    moved = metric_of(fleet, "baton_transfer_bytes_total") - before
    assert (moved > 0) == (placement == "pair")


async def test_chat_answers_in_one_piece_and_streamed_alike(fleet):
    client = client_of(fleet)
    ask = {
        "model": DEMO_MODEL_NAME, "messages": [{"role": "user", "content": "Do you like to dance?"}],
        "max_tokens": 24, "seed": 5, "temperature": 0.8,
    }  # fmt: skip
    whole = await client.chat.completions.create(**ask)
    pieces = []
    async for chunk in await client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
        usage = chunk.usage or None
    assert "".join(pieces) == whole.choices[0].message.content != ""
    assert usage.completion_tokens == whole.usage.completion_tokens > 0


async def test_a_second_turn_reuses_the_first_turns_blocks(fleet):
    client = client_of(fleet)
    prompt = "A prompt that no other test uses, and that is long enough for several blocks of sixteen tokens. " * 4
    first = await client.completions.create(model=DEMO_MODEL_NAME, prompt=prompt, max_tokens=4)
    again = await client.completions.create(model=DEMO_MODEL_NAME, prompt=prompt, max_tokens=4)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= 16 * (again.usage.prompt_tokens // 16 - 1)


async def test_errors_have_openais_shape_and_status(fleet):
    client = client_of(fleet)
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="nobody", prompt="x")
    with pytest.raises(openai.BadRequestError, match="2048"):
        await client.completions.create(model=DEMO_MODEL_NAME, prompt="word " * 3000, max_tokens=5)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        await client.completions.create(model=DEMO_MODEL_NAME, prompt="x", temperature=9)


def test_nothing_listens_beyond_loopback(fleet):
    ours = {os.getpid()} | {process.pid for process in psutil.Process().children(recursive=True)}
    ours |= {p.pid for p in psutil.process_iter() if str(fleet.ray_dir) in " ".join(_command_line(p))}
    open_ports = [
        connection.laddr
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
        and connection.pid in ours
        and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    ]
    assert not open_ports


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def proxy_process() -> psutil.Process:
    """The actor of Serve that keeps HAProxy."""
    (found,) = [p for p in psutil.Process().children(recursive=True) if "HAProxyManager" in " ".join(_command_line(p))]
    return found


async def test_a_proxy_that_answers_late_on_a_busy_machine_is_not_replaced(fleet):
    proxy = proxy_process()
    proxy.suspend()
    await asyncio.sleep(10.0)  # Serve asks every second, and gives it up after three answers that came too late
    proxy.resume()
    async with httpx.AsyncClient(base_url=fleet.url, trust_env=False, timeout=10) as client:
        for _ in range(20):
            assert (await client.get("/readyz")).status_code == 200
            await asyncio.sleep(0.1)
    assert proxy_process().pid == proxy.pid


def rank_pids(role: Role) -> list[int]:
    """Processes of a pool's ranks, the last rank of a replica last."""
    import ray

    names = sorted(
        a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == "baton-ranks"
    )
    actors = [ray.get_actor(name, "baton-ranks") for name in names if name.startswith(role.value)]
    return ray.get([actor.pid.remote() for actor in actors])


@pytest.mark.parametrize("role", list(Role))
async def test_a_killed_rank_under_load_costs_no_client_an_error_or_a_token(fleet, expected, role):
    load = Load(client_of(fleet), expected, 8)
    await load.until_done(8)
    os.kill(rank_pids(role)[-1], signal.SIGKILL)
    await load.until_done(load.num_done + 24)
    await load.finish()
    await until_degraded_is_over(fleet)


def replica_ids(fleet, role: Role) -> dict[str, str]:
    """Address by id of the replicas that take work."""
    found = httpx.get(f"{fleet.url}/fleet", trust_env=False, timeout=10).json()["replicas"]
    infos = [replica["info"] for replica in found if not replica["status"]["draining"]]
    return {info["replica_id"]: info["rank_addresses"][0] for info in infos if info["role"] == role}


def num_running(fleet, role: Role) -> list[int]:
    """Of each replica of a pool, sequences in its batch."""
    found = httpx.get(f"{fleet.url}/fleet", trust_env=False, timeout=10).json()["replicas"]
    return [one["status"]["num_running"] for one in found if one["info"]["role"] == role]


async def test_a_replica_that_was_drained_on_request_is_replaced(fleet, expected):
    await until_degraded_is_over(fleet)
    before = replica_ids(fleet, Role.PREFILL)
    gone, address = next(iter(before.items()))
    load = Load(client_of(fleet), expected, 4)
    await load.until_done(4)
    client = RpcClient(Security(SECRET))
    await client.call(address, DRAIN, Drain(0.0), 60)
    await client.close()
    async with asyncio.timeout(120):
        while len(now := replica_ids(fleet, Role.PREFILL)) < 2 or gone in now:
            await asyncio.sleep(0.2)
    assert len(now.keys() & before.keys()) == 1
    await load.finish()


async def test_scale_down_of_decode_under_load_costs_no_stream(fleet, oracle):
    await until_degraded_is_over(fleet)
    before = resumes_of(fleet)
    prompts = [f"Page {i}. {PROMPTS[i % len(PROMPTS)]}" for i in range(16)]  # cached nowhere
    expected = [oracle.tokens(prompt, NUM_TOKENS) for prompt in prompts]
    load = Load(client_of(fleet), expected, 16, prompts)
    await load.until_done(16)
    async with asyncio.timeout(60):  # whichever goes has streams
        while len(numbers := num_running(fleet, Role.DECODE)) < 2 or not all(numbers):
            load.require_health()
            await asyncio.sleep(0.05)
    await asyncio.to_thread(resize_pool, "v1", Role.DECODE, 1)
    async with asyncio.timeout(60):
        while pool_states(Role.DECODE) != {"RUNNING": 1}:
            await asyncio.sleep(0.1)
    await load.until_done(load.num_done + 8)
    await load.finish()
    assert resumes_of(fleet) > before, "the replica that went was to hand its streams over"
