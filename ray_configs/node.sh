#!/bin/sh
# One host of a Ray cluster for Baton.
#   node.sh keys           on the operator's machine, once: the secrets that the cluster files copy to every host
#   node.sh setup          installs this project into BATON_VENV and puts it on the PATH
#   node.sh head [ROLE]    starts Ray's head; its state is in RocksDB, or in Redis where RAY_REDIS_ADDRESS names one
#   node.sh worker [ROLE]  joins the head at RAY_HEAD_IP
#   node.sh stop           ends Ray on this host
# ROLE (prefill or decode) gives the host one such resource per GPU; leave it out where an autoscaler says what a host
# has. ROLE by_host: hosts whose address is in BATON_PREFILL_HOSTS are prefill, all others decode.
# BATON_NODE_IP: the address that a host with several advertises. NCCL_SOCKET_IFNAME and the like reach every rank.
set -eu
project=$(cd "$(dirname "$0")/.." && pwd)
venv=${BATON_VENV:-$HOME/baton-venv}
state=$HOME/.baton
token=$HOME/.ray/auth_token
keeper=$state/gcs_keeper.pid
port=${BATON_GCS_PORT:-6379}

keys() {
    umask 077
    mkdir -p "$state" "$HOME/.ray"
    [ -s "$token" ] || openssl rand -hex 32 | tr -d '\n' > "$token"
    [ -s "$state/secrets" ] || printf 'BATON_CLUSTER_SECRET=%s\nBATON_API_KEY=%s\n' \
        "$(openssl rand -hex 32)" "$(openssl rand -hex 32)" > "$state/secrets"
}
setup() {
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Baton needs Python 3.11 or newer")'
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/pip" install --quiet --constraint "$project/constraints.txt" --editable "$project"
    grep -qsF "$venv/bin" "$HOME/.bashrc" || echo "export PATH=\"$venv/bin:\$PATH\"" >> "$HOME/.bashrc"
}
environment() {
    ulimit -n "$(ulimit -H -n)"
    ulimit -l unlimited 2> /dev/null || echo "locked memory stays limited; RDMA wants memlock unlimited" >&2
    set -a
    [ ! -s "$state/secrets" ] || . "$state/secrets"
    RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
    RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1 RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=0
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1 RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S=3
    RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60
    RAY_health_check_initial_delay_ms=0 RAY_health_check_period_ms=500 # a lost host is noticed within 2 s
    RAY_health_check_timeout_ms=1000 RAY_health_check_failure_threshold=3
    RAY_gcs_rpc_server_reconnect_timeout_s=120
    set +a
    grep -qs RAY_AUTH_MODE "$HOME/.bashrc" || echo "export RAY_AUTH_MODE=token" >> "$HOME/.bashrc"
}
resources() {
    role=${1:-}
    if [ "$role" = by_host ]; then
        role=decode
        for address in $(hostname -I); do
            case " ${BATON_PREFILL_HOSTS:-} " in *" $address "*) role=prefill ;; esac
        done
    fi
    [ -z "$role" ] || printf '%s' "--resources={\"$role\":${BATON_RANKS:-$(nvidia-smi -L | wc -l)}}"
}
start_head() {
    here=${BATON_NODE_IP:-$(hostname -I | cut -d' ' -f1)} gcs=${BATON_GCS_PATH:-$state/gcs}
    mkdir -p "$gcs" "$state"
    [ -n "${RAY_REDIS_ADDRESS:-}" ] || export RAY_gcs_storage=rocksdb RAY_gcs_storage_path="$gcs"
    [ ! -f ~/ray_bootstrap_config.yaml ] || set -- "$@" "--autoscaling-config=$HOME/ray_bootstrap_config.yaml"
    "$venv/bin/ray" start --head --port="$port" --node-ip-address="$here" "$@"
    nohup "$venv/bin/python" -m cluster.gcs_keeper --port "$port" >> "$state/gcs_keeper.log" 2>&1 < /dev/null &
    echo $! > "$keeper"
}
start_worker() {
    towards_head=$(ip -oneline route get "${RAY_HEAD_IP:?}" | sed 's/.* src \([^ ]*\).*/\1/')
    exec "$venv/bin/ray" start --address="$RAY_HEAD_IP:$port" --node-ip-address="${BATON_NODE_IP:-$towards_head}" "$@"
}
stop() {
    if [ -f "$keeper" ] && grep -qs gcs_keeper "/proc/$(cat "$keeper")/cmdline"; then kill "$(cat "$keeper")"; fi
    [ ! -x "$venv/bin/ray" ] || "$venv/bin/ray" stop
}
case ${1:-} in
    keys | setup | stop) "$1" ;;
    head) environment && start_head $(resources "${2:-}") ;;
    worker) environment && start_worker $(resources "${2:-}") ;;
    *) sed -n '2,10s/^# //p' "$0" && exit 2 ;;
esac
