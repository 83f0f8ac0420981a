"""A fleet that is closed: under mutual TLS its tokens are right, strangers get nothing, and it listens nowhere else."""

import random
import sys
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from core.config import TransferConfig
from core.errors import PeerLost, Unauthorized
from core.messages.fleet import Empty
from core.security import Security
from rpc.client import RpcClient
from rpc.methods import BOOK, HEALTH
from tests.certificates import make_certificates
from tests.fleet.in_process_fleet import HOST, generate, running_fleet
from tests.fleet.test_fleet import reference

LISTENING = "0A"  # include/net/tcp_states.h


@pytest.fixture(scope="module")
def security(tmp_path_factory):
    return Security("of this fleet", make_certificates(tmp_path_factory.mktemp("ours")))


def listening_sockets() -> list[tuple[str, int]]:
    """(address, port) of this process's sockets that wait for TCP connections."""
    inodes = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own
            inodes.add(descriptor.readlink().name.removeprefix("socket:[").removesuffix("]"))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENING and inode in inodes:
                address, port = local.split(":")
                found.append((_host(address), int(port, 16)))
    return found


def _host(digits: str) -> str:
    """The kernel prints the 32-bit words of an address in the machine's byte order."""
    words = [int(digits[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(digits), 8)]
    if len(words) == 1:
        return str(IPv4Address(words[0]))
    address = IPv6Address(b"".join(words))
    return str(address.ipv4_mapped or address)


async def test_under_mutual_tls_handed_off_tokens_are_right_and_strangers_get_nothing(tiny_llama, security, tmp_path):
    path, model = tiny_llama
    rng = random.Random(8)
    prompts = [[rng.randrange(256) for _ in range(n)] for n in (5, 40, 100)]
    async with running_fleet(path, 1, 1, security=security) as fleet:
        for i, prompt in enumerate(prompts):
            assert await generate(fleet, f"r{i}", prompt, 12) == reference(model, prompt, 12)
        replicas = [(replica.info.address, HEALTH) for replica in fleet.replicas.values()]
        for stranger, error in (
            (Security(security.secret), PeerLost),
            (Security(security.secret, make_certificates(tmp_path / "theirs")), PeerLost),
            (Security("guess", security.tls), Unauthorized),
        ):
            client = RpcClient(stranger)
            for address, method in [*replicas, (fleet.scheduler_address, BOOK)]:
                with pytest.raises(error):
                    await client.call(address, method, Empty(), 10)
            await client.close()


@pytest.mark.parametrize("channel", ["tcp", "gloo"])
async def test_a_fleet_on_loopback_listens_on_loopback_alone(tiny_llama, channel):
    path, _ = tiny_llama
    before = set(listening_sockets())
    transfer = TransferConfig(channel=channel, layers_per_group=1, slab_mib=0.01)
    async with running_fleet(path, 1, 1, transfer=transfer) as fleet:
        await generate(fleet, "r", list(range(40)), 4)  # channels are open
        ours = set(listening_sockets()) - before
        served = [replica.info.address for replica in fleet.replicas.values()] + [fleet.scheduler_address]
        assert {f"{host}:{port}" for host, port in ours} >= set(served)
        assert len(ours) >= len(served) + 2, "each rank's rendezvous"
        assert {host for host, _ in ours} == {HOST}
