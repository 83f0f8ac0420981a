"""What a rank is told: which interfaces it takes, and that its orders survive the way through a file."""

import pytest
from pydantic import TypeAdapter

from core.config import ModelConfig, PoolConfig, TransferConfig
from core.messages.fleet import Role
from core.security import Security, TlsConfig
from worker.spec import RankSpec

ADDRESSES = ("10.0.0.7:5000", "10.0.0.7:5001")
SECURITY = Security("of this fleet", TlsConfig(ca_file="a", certificate_file="b", key_file="c"))


def spec_of(store_address: str, security: Security = SECURITY) -> RankSpec:
    return RankSpec(
        Role.DECODE, "d0", 1, 1, ADDRESSES, store_address, ModelConfig(), PoolConfig(), TransferConfig(), 16, security
    )


@pytest.mark.parametrize(
    ("store_address", "host"), [("127.0.0.1:6000", "127.0.0.1"), ("10.0.0.7:6000", "10.0.0.7"), ("", "10.0.0.7")]
)
def test_ranks_that_meet_on_loopback_talk_there_too(store_address, host):
    spec = spec_of(store_address)
    assert (spec.host, spec.port, spec.group_host) == ("10.0.0.7", 5001, host)


def test_the_orders_in_a_file_are_those_that_were_written():
    adapter = TypeAdapter(RankSpec)
    spec = spec_of("127.0.0.1:6000")
    assert adapter.validate_json(adapter.dump_json(spec)) == spec
