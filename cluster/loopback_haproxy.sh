#!/bin/sh
# Runs HAProxy with every port of its generated configuration bound to loopback: Serve lets one choose the numbers of
# the statistics and metrics ports, but binds them on all interfaces.
for argument in "$@"; do
    if [ "$previous" = "-f" ] && [ -f "$argument" ]; then
        sed -i -E 's/^([[:space:]]*bind )(\*|):([0-9]+)/\1127.0.0.1:\3/' "$argument"
    fi
    previous="$argument"
done
exec "$BATON_HAPROXY" "$@"
