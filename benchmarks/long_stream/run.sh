#!/usr/bin/env bash
# A book of PG-19 read to its end by the embedded model, and what moving keys costs in precision.
# Usage: bash benchmarks/long_stream/run.sh [DATASET]     DATASET: pg19 (default) or a folder in the hub's layout
# BOOK: row of the split test (default 3); PYTHON must have coldpress with its extras eval and report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
results=${RESULTS:-results/long_stream}
"$python" benchmarks/long_stream/precision.py --output "$results/precision.json"
"$python" benchmarks/long_stream/long_stream.py --dataset "${1:-pg19}" --sample_idx "${BOOK:-3}" \
    --output "$results/tiny_neox_pg19.json"
PYTHONPATH=src:. "$python" -m benchmarks.long_stream.decoding --dataset "${1:-pg19}" --sample_idx "${LONG_BOOK:-1}" \
    --output "$results/decoding_pg19.json"
"$python" benchmarks/long_stream/long_stream.py --plot "$results/tiny_neox_pg19.json"
