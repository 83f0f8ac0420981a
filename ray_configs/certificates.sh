#!/bin/sh
# For `cluster.tls`, on the operator's machine, once: an authority, and one certificate for all hosts, in ~/.baton/tls.
# Every host needs ca.pem, certificate.pem and key.pem; ca_key.pem stays here. To renew, remove certificate.pem first.
set -eu
umask 077
mkdir -p "$HOME/.baton/tls"
cd "$HOME/.baton/tls"
set -- -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650
[ -s ca.pem ] || openssl req -x509 "$@" -subj "/CN=Baton fleet" -keyout ca_key.pem -out ca.pem
[ -s certificate.pem ] || openssl req -x509 "$@" -CA ca.pem -CAkey ca_key.pem -subj /CN=baton \
    -addext subjectAltName=DNS:baton -addext basicConstraints=critical,CA:FALSE \
    -addext extendedKeyUsage=serverAuth,clientAuth -keyout key.pem -out certificate.pem
