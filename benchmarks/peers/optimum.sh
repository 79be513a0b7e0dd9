#!/bin/sh
# optimum-onnx in an environment of its own: it wants transformers below 4.58, which this project's does not hold.
# Makes build/peers/optimum when it is first run, then measures: benchmarks/peers/optimum.sh [STUDENT] [options].
set -eu
cd "$(dirname "$0")/../.."
venv=build/peers/optimum
if [ ! -e "$venv/.ready" ]; then
    "${PYTHON:-python3}" -m venv "$venv"
    # torch is pinned: an unpinned one may bring gigabytes of CUDA.
    "$venv/bin/python" -m pip install -q 'setuptools>=77' 'optimum-onnx[onnxruntime]==0.1.0' 'transformers<4.58' \
        'torch==2.13.0' 'onnxruntime==1.32.0' diffusers
    "$venv/bin/python" -m pip install -q --no-build-isolation --editable '.[cpu]'
    touch "$venv/.ready"
fi
exec "$venv/bin/python" benchmarks/peers/optimum_bench.py "$@"
