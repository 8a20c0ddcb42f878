#!/bin/sh
# Makes an image with the name of Dockerfile's base from Debian's packages, for `make image-test` on a machine that reaches
# a Debian mirror and no registry. For tests only: it is larger than the real one. Needs root, debootstrap and buildah.
# Usage: tools/stand_in_base.sh [MIRROR]
set -eu
image=docker.io/library/$(sed -n 's/^FROM \(python:[^ ]*\).*/\1/p' "$(dirname "$0")/../Dockerfile" | head -n 1)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# Its Python has to be the one that the image's name promises: trixie's is 3.13.
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip,libpython3-dev \
    "${image##*-}" "$folder" "${1:-http://deb.debian.org/debian}" >/dev/null
ln -s /usr/bin/python3 "$folder/usr/local/bin/python"
rm -rf "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/* "$folder"/usr/share/doc/*
container=$(buildah from scratch)
buildah add -q "$container" "$folder" / >/dev/null
buildah config --cmd python3 --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
buildah commit -q --rm --format docker "$container" "$image" >/dev/null
echo "$image"
