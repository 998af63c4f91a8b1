#!/bin/sh
# Debian packages that the tests use as foreign peers and judges: nft reads our rules back, curl, nghttp2 and dig speak to us. And what
# the data path is compiled with: a C compiler and Python's headers.
# Where there is no root or no apt, says so and goes on: the tests that need a missing program then fail by name.
set -eu
PATH="$PATH:/usr/sbin:/sbin"  # nft and nghttpx are there, and not on the path of ordinary users
missing=""
for pair in nft:nftables ip:iproute2 curl:curl nghttpx:nghttp2 unshare:util-linux dig:bind9-dnsutils \
    cc:build-essential python3-config:python3-dev; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "==> these packages are wanted by tests and can't be installed here (root and apt are needed):$missing" >&2
    exit 0
fi
echo "==> system packages for tests:$missing"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null
