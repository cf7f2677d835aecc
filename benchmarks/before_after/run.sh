#!/usr/bin/env bash
# Milliseconds of a decoded token, beside those of another version, in turns.
# BEFORE=COMMIT, GGUF=FILE (SmolLM2-135M; left out without), ROUNDS (default 12), PYTHON (default .venv/bin/python)
# RESULTS (default results/before_after)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
git archive "$BEFORE" src | tar -x -C "$tree"
results="${RESULTS:-results/before_after}"
run() {
    PYTHONPATH=. "${PYTHON:-.venv/bin/python}" -m benchmarks.before_after.before_after --before "$tree/src" \
        --commit "$(git rev-parse --short "$BEFORE")" --rounds "${ROUNDS:-12}" "$@"
}
run --model pythia-70m --tokens 8192 --output "$results/pythia_float32.json"
for dtype in ${GGUF:+float32 bfloat16}; do
    run --model smollm2-135m --gguf "$GGUF" --dtype "$dtype" --tokens 4096 --output "$results/smollm2_$dtype.json"
done
