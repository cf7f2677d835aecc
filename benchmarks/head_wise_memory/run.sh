#!/usr/bin/env bash
# Bytes of caches whose heads hold different numbers of pairs, and decoding from them; SmolLM2-135M's shape.
# Usage: bash benchmarks/head_wise_memory/run.sh [GGUF]    GGUF: SmolLM2-135M's weights; random ones without
# PYTHON must have coldpress; with kvpress beside it (benchmarks/parity/requirements.txt) its rows are there as well.
# RESULTS=benchmarks/head_wise_memory/results, then python scripts/generate_docs.py: the tables of the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS="${THREADS:-2}"
"${PYTHON:-.venv/bin/python}" -m benchmarks.head_wise_memory.head_wise_memory --threads "$OMP_NUM_THREADS" \
    --rounds "${ROUNDS:-8}" ${1:+--gguf "$1"} --output "${RESULTS:-results/head_wise_memory}/smollm2-135m.json"
