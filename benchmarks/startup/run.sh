#!/usr/bin/env bash
# CPU seconds of commands that compute nothing and of imports, beside those of another version, in turns.
# BEFORE=COMMIT (default: none), ROUNDS (default 5), PYTHON (default .venv/bin/python)
# RESULTS=benchmarks/startup/results, then python scripts/generate_docs.py: the table of the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
before=()
if [ -n "${BEFORE:-}" ]; then
    tree=$(mktemp -d)
    trap 'rm -rf "$tree"' EXIT
    git archive "$BEFORE" src | tar -x -C "$tree"
    before=(--before "$tree/src")
fi
PYTHONPATH=. "${PYTHON:-.venv/bin/python}" -m benchmarks.startup.startup --rounds "${ROUNDS:-5}" "${before[@]}" \
    --output "${RESULTS:-results/startup}/cpu.json"
