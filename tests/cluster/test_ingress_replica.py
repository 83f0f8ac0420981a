"""The ingress's replica, as far as it goes without a cluster."""

import pytest

from core.errors import PeerLost


async def test_a_scheduler_that_serve_cannot_reach_is_lost_like_any_peer():
    """Anything else would end the task that follows the address book, once and for all."""
    from ray.exceptions import ActorDiedError
    from ray.serve.exceptions import RayServeException

    from cluster.ingress_replica import address_of

    class Handle:
        def __init__(self, error: Exception) -> None:
            self.address = self
            self._error = error

        async def remote(self) -> str:
            raise self._error

    for error in (ActorDiedError(), RayServeException("no replica")):
        with pytest.raises(PeerLost):
            await address_of(Handle(error))
