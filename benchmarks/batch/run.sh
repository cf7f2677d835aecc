#!/usr/bin/env bash
# Tokens a second in batches of 1, 8 and 32 padded prompts, and of as many as fit into 256 MiB; Pythia-70M's shape.
# Usage: bash benchmarks/batch/run.sh
# PYTHON must have coldpress. Nothing else should run on the machine.
# RESULTS=benchmarks/batch/results, then python scripts/generate_docs.py: the table of the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS="${THREADS:-2}"
"${PYTHON:-.venv/bin/python}" -m benchmarks.batch.batch --threads "$OMP_NUM_THREADS" --rounds "${ROUNDS:-8}" \
    --output "${RESULTS:-results/batch}/pythia-70m.json"
"${PYTHON:-.venv/bin/python}" -m benchmarks.batch.budget --threads "$OMP_NUM_THREADS" --rounds "${ROUNDS:-8}" \
    --output "${RESULTS:-results/batch}/budget-pythia-70m.json"
