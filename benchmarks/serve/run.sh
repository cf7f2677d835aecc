#!/usr/bin/env bash
# A server of compressed snapshots: time to a first token, documents in memory, and that nothing grows.
# Usage: bash benchmarks/serve/run.sh SmolLM2-135M.gguf PG19
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
results=${RESULTS:-benchmarks/serve/results}
measure() {
    PYTHONPATH=src:. "$python" -m benchmarks.serve.serve "$1" --model "$MODEL" --dataset "$TEXTS" "${@:2}" \
        --output "$results/$1-smollm2-135m.json"
}
MODEL=$1 TEXTS=$2
measure first
measure documents --llama
measure steady --new_tokens 4
