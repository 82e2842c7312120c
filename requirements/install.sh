#!/bin/sh
# Install the pinned requirements into the environment of $PYTHON: install.sh cpu|gpu
set -eu
cd "$(dirname "$0")/.."
pip() { "$PYTHON" -m pip --quiet --disable-pip-version-check "$@"; }

case $1 in
cpu)
    # By itself and first, so that nothing else brings a CUDA build of torch along.
    if ! pip install -r requirements/torch-cpu.txt; then
        echo "$(tail -n 1 requirements/torch-cpu.txt) is not in the package indexes that pip knows. PyTorch publishes it" >&2
        echo "in an index of its own for CPU builds: see 'Get started' on pytorch.org, set PIP_EXTRA_INDEX_URL to it and" >&2
        echo "run make again." >&2
        exit 1
    fi
    pip install --no-deps -r requirements/cpu.txt
    ;;
gpu) pip install --no-deps -r requirements/gpu.txt ;;
*)
    echo "DEVICE: '$1': expected cpu or gpu" >&2
    exit 2
    ;;
esac
pip install --no-deps --no-build-isolation --editable .
