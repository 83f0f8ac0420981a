"""The import rules between packages, and the purity of the modules that decide."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED = {
    "core": set(),
    "rpc": {"core"},
    "engine": {"core"},
    "kv_transfer": {"core"},
    "worker": {"core", "rpc", "engine", "kv_transfer"},
    "prefill_worker": {"core", "rpc", "engine", "kv_transfer", "worker"},
    "decode_worker": {"core", "rpc", "engine", "kv_transfer", "worker"},
    "cluster": {"core", "rpc", "kv_transfer", "prefill_worker", "decode_worker", "worker", "models"},
    "models": set(),
    "simulator": {"core", "cluster", "engine", "kv_transfer", "prefill_worker", "decode_worker", "worker"},
    "bench": {
        "core",
        "rpc",
        "engine",
        "kv_transfer",
        "prefill_worker",
        "decode_worker",
        "worker",
        "cluster",
        "models",
        "simulator",
    },
}

# package or module prefix -> the only places that may import it
HOMES = {
    "ray": ("cluster/", "bench/"),
    "grpc": ("rpc/",),
    "msgpack": ("rpc/", "bench/index_peer.py"),  # which speaks another system's events, under its interpreter
    "torch.distributed": ("kv_transfer/channels/", "engine/tensor_parallel.py", "engine/rank_store.py"),
    "tokenizers": ("cluster/ingress/", "models/"),
    "flashinfer": ("engine/flashinfer_library.py",),
}

PURE = [
    "cluster.check.agreement",
    "cluster.check.node_types",
    "cluster.check.plan",
    "cluster.check.rank_memory",
    "cluster.doctor.compare",
    "cluster.autoscaling.autoscaling",
    "cluster.autoscaling.budget",
    "cluster.autoscaling.forecast",
    "cluster.autoscaling.holt_winters",
    "cluster.autoscaling.itl_model",
    "cluster.autoscaling.policy",
    "cluster.autoscaling.schedule",
    "cluster.autoscaling.signals",
    "cluster.autoscaling.slo",
    "cluster.autoscaling.smoothing",
    "cluster.autoscaling.steady",
    "cluster.scheduler.accuracy",
    "cluster.scheduler.admission",
    "cluster.scheduler.asked_sizes",
    "cluster.scheduler.batch_yields",
    "cluster.scheduler.candidate",
    "cluster.scheduler.class_fit",
    "cluster.scheduler.cost_book",
    "cluster.scheduler.decision",
    "cluster.scheduler.decision_log",
    "cluster.scheduler.depths",
    "cluster.scheduler.expected_length",
    "cluster.scheduler.fair_share",
    "cluster.scheduler.fewest_late",
    "cluster.scheduler.fleet_signals",
    "cluster.scheduler.fleet_view",
    "cluster.scheduler.flights",
    "cluster.scheduler.generations",
    "cluster.scheduler.handoff_time",
    "cluster.scheduler.headroom",
    "cluster.scheduler.hits",
    "cluster.scheduler.holders",
    "cluster.scheduler.index",
    "cluster.scheduler.key_log",
    "cluster.scheduler.keeping",
    "cluster.scheduler.learned",
    "cluster.scheduler.known_links",
    "cluster.scheduler.link_book",
    "cluster.scheduler.link_end",
    "cluster.scheduler.local_prefill",
    "cluster.scheduler.matches",
    "cluster.scheduler.overtaking",
    "cluster.scheduler.pace",
    "cluster.scheduler.pairing",
    "cluster.scheduler.policy",
    "cluster.scheduler.prefix_care",
    "cluster.scheduler.ranked",
    "cluster.scheduler.refusals",
    "cluster.scheduler.replica_view",
    "cluster.scheduler.reservations",
    "cluster.scheduler.robust_fit",
    "cluster.scheduler.rules",
    "cluster.scheduler.shared_work",
    "cluster.scheduler.shortlist",
    "cluster.scheduler.site",
    "cluster.scheduler.source",
    "cluster.scheduler.step_costs",
    "cluster.scheduler.traffic",
    "cluster.scheduler.triage",
    "cluster.scheduler.wait_forecast",
    "cluster.scheduler.waiting_line",
    "cluster.scheduler.water_level",
    "cluster.scheduler.weighed",
    "cluster.scheduler.weighing",
    "cluster.scheduler.workload_meter",
    "decode_worker.links",
    "cluster.weight_lenders",
    "decode_worker.coming",
    "decode_worker.handoff",
    "decode_worker.handoff_blocks",
    "decode_worker.handoffs",
    "decode_worker.scheduler",
    "decode_worker.shared_prefixes",
    "decode_worker.token_events",
    "cluster.ingress.stop_strings",
    "core.kv_groups",
    "core.layer_windows",
    "core.weight_budget",
    "engine.batch",
    "engine.batch_codec",
    "engine.block_pool",
    "engine.eviction_order",
    "engine.group_blocks",
    "engine.layer_groups",
    "engine.orders",
    "engine.sequence",
    "kv_transfer.channels.borrowed_time",
    "kv_transfer.flow_control",
    "kv_transfer.lease_book",
    "kv_transfer.pair_book",
    "kv_transfer.timeline",
    "kv_transfer.session",
    "kv_transfer.share_book",
    "kv_transfer.tombstones",
    "prefill_worker.deliveries",
    "prefill_worker.scheduler",
    "cluster.ingress.pacer",
    "cluster.ingress.plan_alone",
    "simulator.cost.cost_model",
    "simulator.borrowing",
    "simulator.decode_engine",
    "simulator.decode_replica",
    "simulator.events",
    "simulator.decode_tokens",
    "simulator.fault_spec",
    "simulator.lease_heartbeat",
    "simulator.retries",
    "simulator.fleet",
    "simulator.faults",
    "simulator.scaling_loop",
    "simulator.step_work",
    "simulator.summary",
    "simulator.baselines.catalog",
    "simulator.baselines.dynamo",
    "simulator.baselines.least_outstanding",
    "simulator.baselines.llm_d",
    "simulator.baselines.mooncake",
    "simulator.baselines.power_of_two",
    "simulator.baselines.preble",
    "simulator.baselines.ray_prefix",
    "simulator.baselines.round_robin",
    "simulator.baselines.session_stick",
    "simulator.baselines.sglang_gateway",
    "simulator.baselines.staged",
    "simulator.fleet_spec",
    "simulator.host",
    "simulator.ingress",
    "simulator.network",
    "simulator.peers",
    "simulator.prefill_replica",
    "simulator.records",
    "simulator.quiet_steps",
    "simulator.reporting",
    "simulator.request",
    "simulator.scheduler_line",
    "simulator.scheduler_process",
    "simulator.series",
    "simulator.twin",
    "simulator.wire",
    "simulator.cost.apart_loop",
    "simulator.cost.campaigns",
    "simulator.cost.closed_loop",
    "simulator.cost.engines",
    "simulator.cost.fit_engines",
    "simulator.cost.gpu_cost_model",
    "simulator.cost.gpu_spec",
    "simulator.cost.gpus",
    "simulator.cost.kernel_times",
    "simulator.cost.least_squares",
    "simulator.cost.measured_costs",
    "simulator.cost.models",
    "simulator.cost.run_times",
    "simulator.replay",
    "simulator.traces.agent_sessions",
    "simulator.traces.block_ids",
    "simulator.traces.client_mixes",
    "simulator.traces.decisions",
    "simulator.traces.dynamo",
    "simulator.traces.kinds",
    "simulator.traces.scaling",
    "simulator.traces.trace",
    "simulator.traces.turns",
    "kv_transfer.pieces",
    "kv_transfer.plan",
    "kv_transfer.channels.choice",
    "rpc.protocol",
    "worker.drain",
    "worker.arriving",
    "worker.lender",
    "worker.samples",
]
IMPURE_IMPORTS = {"torch", "ray", "grpc", "asyncio", "threading", "time"}


def sources() -> list[Path]:
    return [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_packages_import_only_what_they_may():
    broken = []
    for path in sources():
        package = path.relative_to(ROOT).parts[0]
        ours = {name.split(".")[0] for name in imported_modules(path)} & ALLOWED.keys()
        broken += [f"{path.relative_to(ROOT)} imports {name}" for name in ours - ALLOWED[package] - {package}]
    assert not broken


def test_libraries_stay_at_home():
    broken = []
    for path in sources():
        place = str(path.relative_to(ROOT))
        for name in imported_modules(path):
            for library, homes in HOMES.items():
                if (name + ".").startswith(library + ".") and not place.startswith(homes):
                    broken.append(f"{place} imports {name}")
    assert not broken


def test_environment_is_read_only_where_config_is_loaded():
    readers = {
        str(path.relative_to(ROOT))
        for path in sources()
        if any(word in path.read_text() for word in ("os.environ.get", "os.getenv", "environ["))
    }
    assert readers <= {"core/config.py"}


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_nothing_that_acts(module: str):
    probe = f"import sys, {module}; print(*sorted({IMPURE_IMPORTS!r} & set(sys.modules)))"
    clean = "import sys; print(*sorted(set(sys.modules)))"
    at_start = set(subprocess.check_output([sys.executable, "-S", "-c", clean], cwd=ROOT, text=True).split())
    loaded = subprocess.check_output([sys.executable, "-c", probe], cwd=ROOT, text=True).split()
    direct = {name.split(".")[0] for name in imported_modules(ROOT / (module.replace(".", "/") + ".py"))}
    assert not direct & IMPURE_IMPORTS
    assert not (set(loaded) - at_start) - {"time", "threading"}, loaded
