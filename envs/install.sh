#!/bin/sh
# Makes the environment of the images in /opt/dmir, on Debian 12. Both descriptions, Containerfile and dmir.def, run
# this with the files beside it: what is installed stands in them and nowhere else.
set -eu
export DEBIAN_FRONTEND=noninteractive
here=$(dirname "$0")
apt-get update
apt-get install -y --no-install-recommends ca-certificates procps python3.11 python3.11-venv
rm -rf /var/lib/apt/lists/*
# jobs are started as `python`, which is this one once its folder leads PATH
python3.11 -m venv /opt/dmir
/opt/dmir/bin/pip install --no-cache-dir --disable-pip-version-check \
    -r "$here/requirements.txt" -c "$here/constraints.txt"
/opt/dmir/bin/pip install --no-cache-dir --disable-pip-version-check --no-deps -r "$here/requirements-elastix.txt"
