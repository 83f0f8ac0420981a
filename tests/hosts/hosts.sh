#!/bin/sh
# Hosts for tests, made of namespaces (network, pid, mount, uts, ipc) on a bridge that nothing outside can see.
#   hosts.sh up N          hosts 10.77.0.10, .11, ...; each has sshd on port 22, a home, /tmp/ray and /dev/shm of its own
#   hosts.sh hub CMD...    runs a command beside the bridge: where an operator sits
#   hosts.sh cut I | heal I   takes host I off the network, and back
#   hosts.sh kill I | revive I   ends host I at once, all its processes with it; boots it again, its disk as it was
#   hosts.sh bytes I       bytes that host I has received and sent
#   hosts.sh down          ends all of it
# STATE is a folder for keys and homes, BIN a folder that hosts have on their PATH. Needs root, sshd, rsync, ip.
set -eu
NET=10.77.0

start_host() {
    host=h$1 folder=$STATE/h$1 address=$NET.1$1
    ip netns add "$host"
    # the same hardware address after every boot, as others remember it
    ip link add "v$1" netns hub type veth peer name eth0 netns "$host" address "02:00:00:00:00:1$1"
    ip netns exec hub ip link set "v$1" master br0 up
    ip netns exec "$host" sh -c "ip addr add $address/24 dev eth0 && ip link set eth0 up && ip link set lo up"
    mkdir -p "$folder/home/.ssh" "$folder/ray"
    echo "export PATH=$BIN:\$PATH" | tee "$folder/home/.bashrc" > "$folder/home/.bash_profile"
    printf '%s\n' "ListenAddress $address" "HostKey $STATE/ssh/host" "AuthorizedKeysFile $STATE/ssh/operator.pub" \
        "StrictModes no" "UsePAM no" "PidFile none" "MaxStartups 50" "MaxSessions 100" \
        "SetEnv PATH=$BIN:/usr/local/bin:/usr/bin:/bin:/usr/sbin HOSTNAME=$host" > "$folder/sshd_config"
    # an interpreter may live in the home that the host's own one covers
    ip netns exec "$host" unshare --pid --mount --uts --ipc --fork --kill-child --mount-proc sh -c "
        hostname $host
        [ ! -d \$HOME/.pyenv ] || { mkdir -p $folder/home/.pyenv && mount --bind \$HOME/.pyenv $folder/home/.pyenv; }
        mkdir -p /tmp/ray && mount --bind $folder/ray /tmp/ray && mount -t tmpfs -o size=4g tmpfs /dev/shm
        mount --rbind $folder/home \$HOME
        exec /usr/sbin/sshd -D -f $folder/sshd_config -E $folder/sshd.log" < /dev/null > "$folder/log" 2>&1 &
    echo $! > "$folder/pid"
}
up() {
    mkdir -p "$STATE/ssh" /run/sshd
    for key in operator host; do ssh-keygen -q -t ed25519 -N '' -f "$STATE/ssh/$key"; done
    ip netns add hub
    ip netns exec hub sh -c "ip link set lo up; ip link add br0 type bridge; ip addr add $NET.1/24 dev br0; ip link set br0 up"
    for i in $(seq 0 $(($1 - 1))); do start_host "$i"; done
}
end_host() {
    [ ! -f "$STATE/h$1/pid" ] || kill -KILL "$(cat "$STATE/h$1/pid")" 2> /dev/null || true
    ip netns del "h$1" 2> /dev/null || true
    ip netns exec hub ip link del "v$1" 2> /dev/null || true # else it stays until the last process of the host is gone
}
down() {
    for folder in "$STATE"/h[0-9]*; do [ ! -d "$folder" ] || end_host "${folder##*/h}"; done
    ip netns del hub 2> /dev/null || true
    rm -rf "$STATE"
}
action=${1:-help}
[ $# -eq 0 ] || shift
case $action in
    up | down) "$action" "$@" ;;
    hub) exec ip netns exec hub "$@" ;;
    cut) ip netns exec hub ip link set "v$1" down ;;
    heal) ip netns exec hub ip link set "v$1" up ;;
    kill) end_host "$1" ;;
    revive) start_host "$1" ;;
    bytes) ip netns exec "h$1" sh -c 'cat /sys/class/net/eth0/statistics/rx_bytes /sys/class/net/eth0/statistics/tx_bytes' ;;
    *) sed -n '2,9s/^# //p' "$0" && exit 2 ;;
esac
