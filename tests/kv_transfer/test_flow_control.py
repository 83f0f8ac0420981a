"""Whose slabs are asked for next: limits hold in every order of events, nobody starves, the earliest due goes first."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from core.messages.to_rank import Copy, Span
from kv_transfer.flow_control import Flow, FlowControl, Slab

SPAN = Span(0, 1, (0,), 0, 1)
COPY = Copy(0, SPAN, SPAN)


def flow(peer: str, due: float, sizes: list[int]) -> Flow:
    return Flow(peer, due, deque(Slab(COPY, (), size) for size in sizes))


def granted(control: FlowControl, peers=("a", "b", "c")) -> list[tuple[str, float, int]]:
    """(peer, due, bytes) of what is taken now, peer by peer."""
    taken = control.take(peers)
    return [(peer, flow.due, slab.num_bytes) for peer, grants in taken.items() for flow, slab in grants]


def test_what_is_due_first_goes_first_even_when_it_came_last():
    control = FlowControl(pair_bytes=20, rank_bytes=100)
    control.add(flow("a", 9.0, [10, 10, 10]))
    control.add(flow("a", 1.0, [10]))
    assert granted(control) == [("a", 1.0, 10), ("a", 9.0, 10)]


def test_equal_ones_share_a_link_byte_by_byte():
    control = FlowControl(pair_bytes=40, rank_bytes=100)
    large, small = flow("a", 1.0, [20] * 9), flow("a", 1.0, [10] * 9)
    control.add(large)
    control.add(small)
    control.take("a")
    assert (large.granted_bytes, small.granted_bytes) == (20, 20)


def test_one_peer_cannot_take_the_whole_rank_and_a_slab_beyond_the_limit_passes_alone():
    control = FlowControl(pair_bytes=20, rank_bytes=50)
    control.add(flow("a", 1.0, [10] * 5))
    control.add(flow("b", 2.0, [70, 70]))
    control.add(flow("c", 3.0, [10] * 5))
    assert granted(control) == [("a", 1.0, 10)] * 2 + [("c", 3.0, 10)] * 2
    alone = FlowControl(pair_bytes=20, rank_bytes=50)
    alone.add(flow("b", 2.0, [70, 70]))
    assert granted(alone) == [("b", 2.0, 70)]
    assert granted(alone) == []


def test_peers_without_an_open_channel_wait_and_keep_their_place():
    control = FlowControl(pair_bytes=20, rank_bytes=50)
    control.add(flow("a", 1.0, [10, 11]))
    assert control.take({"b"}) == {}
    assert control.waiting_peers() == {"a"}
    grants = control.take({"a"})["a"]
    control.put_back(grants)
    assert control.in_flight == {}
    assert granted(control) == [("a", 1.0, 10)], "in the same order, as far as there is room"


@given(data=st.data())
def test_limits_hold_and_everything_arrives_whatever_the_order_of_events(data):
    """All slabs are granted exactly once, or belong to flows that were dropped."""
    pair_bytes, rank_bytes = data.draw(st.integers(1, 30)), data.draw(st.integers(30, 60))
    control = FlowControl(pair_bytes, rank_bytes)
    flows: list[Flow] = []
    total = {}
    in_flight: list[tuple[Flow, Slab]] = []
    for _ in range(data.draw(st.integers(1, 40))):
        event = data.draw(st.sampled_from(["add", "take", "end", "put back", "drop"]))
        if event == "add":
            sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
            one = flow(data.draw(st.sampled_from("abc")), data.draw(st.floats(0, 3)), sizes)
            flows.append(one)
            total[one] = sum(sizes)
            control.add(one)
        elif event == "take":
            in_flight += [
                grant
                for grants in control.take(data.draw(st.sets(st.sampled_from("abc")))).values()
                for grant in grants
            ]
        elif event == "end" and in_flight:
            control.give_back(*in_flight.pop(data.draw(st.integers(0, len(in_flight) - 1))))
        elif event == "put back" and in_flight:
            control.put_back([in_flight.pop()])
        elif event == "drop" and flows:
            control.drop(flows[data.draw(st.integers(0, len(flows) - 1))])
        control.validate()
        for peer, num_bytes in control.in_flight.items():
            alone = sum(f.peer == peer for f, _ in in_flight) == 1
            assert num_bytes <= pair_bytes or alone
        assert sum(control.in_flight.values()) <= rank_bytes or len(in_flight) == 1
    while True:
        for grant in in_flight:
            control.give_back(*grant)
        in_flight = [grant for grants in control.take("abc").values() for grant in grants]
        control.validate()
        if not in_flight:
            break
    for one in control.flows:
        assert one.granted_bytes == total[one] and not one.waiting
