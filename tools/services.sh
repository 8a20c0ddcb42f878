#!/bin/sh
# Install the system packages that tests call where that is possible; otherwise say which are missing and go on:
# the tests themselves decide what a missing one means (a skip on a desk, a failure in CI).
# Usage: tools/services.sh COMMAND:PACKAGE …
set -eu
packages=
for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || packages="$packages ${pair#*:}"
done
[ -n "$packages" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "Installing the system packages$packages."
    apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $packages >/dev/null && exit 0
    echo "make: apt-get could not install$packages; the tests that need them will say so." >&2
else
    echo "make: not installed:$packages. Tests that need them will say so. As root on Debian or Ubuntu: apt-get install$packages" >&2
fi
