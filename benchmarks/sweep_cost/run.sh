#!/usr/bin/env bash
# Nine presses at four ratios in one sweep, and one by one: Pythia-70M's shape, random weights. Nothing else should run.
# THREADS (default 2), ROUNDS (default 5), SIZES (default "1536+512 1920+128": context and target tokens)
# RESULTS=benchmarks/sweep_cost/results, then python scripts/generate_docs.py: the tables of the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
read -ra sizes <<< "${SIZES:-1536+512 1920+128}"
"${PYTHON:-.venv/bin/python}" -m benchmarks.sweep_cost.sweep_cost --threads "${THREADS:-2}" --rounds "${ROUNDS:-5}" \
    --sizes "${sizes[@]}" --output "${RESULTS:-results/sweep_cost}/pythia-70m.json"
