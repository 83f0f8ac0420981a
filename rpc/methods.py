"""Every remote call of the fleet: its name, request and response."""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from core.messages import fleet, to_decode, to_lender, to_prefill, to_rank, to_scheduler

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True)
class Unary(Generic[Request, Response]):
    """One request, one response."""

    name: str
    request: type[Request]
    response: type[Response]


@dataclass(frozen=True)
class ServerStream(Generic[Request, Response]):
    """One request, many responses."""

    name: str
    request: type[Request]
    response: type[Response]


@dataclass(frozen=True)
class AgentCalls:
    """What transfer agents ask of each other. A rank has one agent for KV, and one for weights while it lends them."""

    connect: Unary[to_rank.Connect, to_rank.Connected]
    ready: Unary[to_rank.Ready, to_rank.Granted]
    digest: Unary[to_rank.DigestBlocks, to_rank.BlockDigests]
    close: Unary[to_rank.CloseChannel, fleet.Acknowledged]


OPEN = Unary("Open", to_decode.Open, to_decode.Ticket)
CANCEL = Unary("Cancel", to_decode.Cancel, fleet.Acknowledged)
ANNOUNCE = Unary("Announce", to_decode.Announce, fleet.Acknowledged)
COMMIT = Unary("Commit", to_decode.Commit, fleet.Acknowledged)
ABANDON = Unary("Abandon", to_decode.Abandon, fleet.Acknowledged)
MAKE_ROOM = Unary("MakeRoom", to_decode.MakeRoom, fleet.Acknowledged)
RENEW_LEASES = Unary("RenewLeases", to_decode.RenewLeases, to_decode.RenewedLeases)
TOKENS = ServerStream("Tokens", to_decode.TokensFrom, to_decode.TokenFrame)

PREFILL = Unary("Prefill", to_prefill.Prefill, to_prefill.FirstToken)
RELEASE = Unary("Release", to_prefill.Release, fleet.Acknowledged)

BORROW = Unary("Borrow", to_lender.Borrow, to_lender.Lent)
TAKE_OVER = Unary("TakeOver", to_lender.TakeOver, fleet.Acknowledged)
GIVE_BACK = Unary("GiveBack", to_lender.GiveBack, fleet.Empty)
BORROW_WEIGHTS = Unary("BorrowWeights", to_lender.BorrowWeights, to_lender.LentWeights)
FILL_WINDOW = Unary("FillWindow", to_lender.FillWindow, fleet.Empty)
GIVE_BACK_WEIGHTS = Unary("GiveBackWeights", to_lender.GiveBackWeights, fleet.Acknowledged)

WATCH = ServerStream("Watch", to_scheduler.Watch, to_scheduler.Report)
DRAIN = Unary("Drain", fleet.Drain, fleet.Empty)

CONNECT = Unary("Connect", to_rank.Connect, to_rank.Connected)
READY = Unary("Ready", to_rank.Ready, to_rank.Granted)
DIGEST_BLOCKS = Unary("DigestBlocks", to_rank.DigestBlocks, to_rank.BlockDigests)
CLOSE_CHANNEL = Unary("CloseChannel", to_rank.CloseChannel, fleet.Acknowledged)
KV_CALLS = AgentCalls(CONNECT, READY, DIGEST_BLOCKS, CLOSE_CHANNEL)
WEIGHT_CALLS = AgentCalls(
    replace(CONNECT, name="ConnectForWeights"),
    replace(READY, name="ReadyForWeights"),
    replace(DIGEST_BLOCKS, name="DigestWeights"),
    replace(CLOSE_CHANNEL, name="CloseWeightChannel"),
)
PREPARE_PAIRS = Unary("PreparePairs", to_rank.PreparePairs, fleet.Empty)
READ_TIMELINE = Unary("ReadTimeline", to_rank.ReadTimeline, to_rank.TimelineEvents)
FETCH_BLOCKS = Unary("FetchBlocks", to_rank.FetchBlocks, to_rank.Fetched)
HOLDS = Unary("Holds", to_rank.SlabHeader, fleet.Acknowledged)
MOVE_BLOCKS = Unary("MoveBlocks", to_rank.TierMove, fleet.Empty)
HEALTH = Unary("Health", fleet.Empty, fleet.RankHealth)

RESERVE = Unary("Reserve", to_scheduler.Reserve, to_scheduler.Plan)
PROGRESS = Unary("Progress", to_scheduler.Progress, fleet.Acknowledged)
REGISTER = Unary("Register", to_scheduler.Register, to_scheduler.Registered)
DEREGISTER = Unary("Deregister", to_scheduler.Deregister, fleet.Acknowledged)
FINISH = Unary("Finish", to_scheduler.Finish, fleet.Acknowledged)
RENEW = Unary("Renew", to_scheduler.Renew, fleet.Acknowledged)
BOOK = Unary("Book", fleet.Empty, to_scheduler.Book)
SET_TRAFFIC = Unary("SetTraffic", to_scheduler.SetTraffic, to_scheduler.Traffic)
WHY = Unary("Why", to_scheduler.Why, to_scheduler.Decisions)
FLEET = Unary("Fleet", fleet.Empty, to_scheduler.FleetStatus)
