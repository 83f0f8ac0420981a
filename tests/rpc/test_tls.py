"""Mutual TLS over a real port: the fleet's own are served, all others refused and told why as far as it shows."""

from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from core.errors import PeerLost, Unauthorized
from core.messages.fleet import Acknowledged
from core.messages.to_decode import Cancel, TokenFrame, TokensFrom
from core.security import Security, TlsConfig
from rpc.client import RpcClient
from rpc.methods import CANCEL, TOKENS
from rpc.server import SERVICE, RpcServer
from tests.certificates import make_certificates

HOST = "127.0.0.1"
SECRET = "of this fleet"
PLAIN = Security(SECRET)


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> TlsConfig:
    return make_certificates(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> TlsConfig:
    return make_certificates(tmp_path_factory.mktemp("theirs"))


class Served:
    """A server that counts whom it let in."""

    def __init__(self, security: Security) -> None:
        self.num_calls = 0
        self.server = RpcServer(HOST, security)
        self.server.unary(CANCEL, self.cancel)
        self.server.stream(TOKENS, self.tokens)
        self.address = f"{HOST}:{self.server.listen()}"

    async def cancel(self, _: Cancel) -> Acknowledged:
        self.num_calls += 1
        return Acknowledged()

    async def tokens(self, _: TokensFrom):
        self.num_calls += 1
        for i in range(3):
            yield TokenFrame(i, ())


@asynccontextmanager
async def serving(security: Security):
    served = Served(security)
    await served.server.start()
    try:
        yield served
    finally:
        await served.server.stop()


async def call(address: str, security: Security) -> Acknowledged:
    client = RpcClient(security)
    try:
        return await client.call(address, CANCEL, Cancel("r", 1), 10)
    finally:
        await client.close()


def test_certificates_are_made_once_and_for_their_owner_alone(tmp_path):
    folder = Path(make_certificates(tmp_path).key_file).parent
    made = {file.name: file.read_text() for file in folder.iterdir()}
    assert made.keys() == {"ca.pem", "ca_key.pem", "certificate.pem", "key.pem"}
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    make_certificates(tmp_path)
    assert {file.name: file.read_text() for file in folder.iterdir()} == made


async def test_calls_and_streams_pass_between_two_of_the_fleet(ours):
    async with serving(Security(SECRET, ours)) as served:
        client = RpcClient(Security(SECRET, ours))
        assert await client.call(served.address, CANCEL, Cancel("r", 1), 10) == Acknowledged()
        frames = [frame.sequence async for frame in client.stream(served.address, TOKENS, TokensFrom("i"))]
        assert frames == [0, 1, 2]
        await client.close()


async def test_the_right_certificate_does_not_stand_in_for_the_secret(ours):
    async with serving(Security(SECRET, ours)) as served:
        with pytest.raises(Unauthorized):
            await call(served.address, Security("guess", ours))
        assert served.num_calls == 0


def mixed(ours: TlsConfig, **files: str) -> TlsConfig:
    return TlsConfig.model_validate(ours.model_dump() | files)


async def test_a_certificate_of_another_authority_is_refused(ours, theirs):
    impostor = mixed(ours, certificate_file=theirs.certificate_file, key_file=theirs.key_file)
    async with serving(Security(SECRET, ours)) as served:
        with pytest.raises(PeerLost, match=r"refuses our certificate \(cluster\.tls\)"):
            await call(served.address, Security(SECRET, impostor))
        with pytest.raises(PeerLost, match=r"not signed by our cluster\.tls\.ca_file"):
            await call(served.address, Security(SECRET, theirs))
        assert served.num_calls == 0


async def test_a_client_that_shows_no_certificate_is_refused(ours):
    async with serving(Security(SECRET, ours)) as served:
        credentials = grpc.ssl_channel_credentials(ours.read().ca)
        options = [("grpc.ssl_target_name_override", "baton")]
        async with grpc.aio.secure_channel(served.address, credentials, options=options) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/{SERVICE}/{CANCEL.name}")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert served.num_calls == 0


async def test_a_server_of_another_name_is_not_believed(ours):
    async with serving(Security(SECRET, ours)) as served:
        with pytest.raises(PeerLost, match=r"does not carry our cluster\.tls\.server_name"):
            await call(served.address, Security(SECRET, mixed(ours, server_name="drum")))
        assert served.num_calls == 0


async def test_plain_and_tls_peers_refuse_each_other_and_name_tls(ours):
    async with serving(Security(SECRET, ours)) as served:
        with pytest.raises(PeerLost, match=r"may speak TLS, and we do not \(cluster\.tls\)"):
            await call(served.address, PLAIN)
        assert served.num_calls == 0
    async with serving(PLAIN) as served:
        with pytest.raises(PeerLost, match=r"it speaks no TLS, and we do \(cluster\.tls\)"):
            await call(served.address, Security(SECRET, ours))
        assert served.num_calls == 0


async def test_nobody_listening_is_not_blamed_on_tls(ours):
    with pytest.raises(PeerLost, match="Connection refused") as caught:
        await call(f"{HOST}:1", Security(SECRET, ours))
    assert "TLS" not in str(caught.value)
