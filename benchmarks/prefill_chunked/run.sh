#!/usr/bin/env bash
# 8,192 to 32,768 tokens in one piece and in pieces of 512 under a budget of 2,048: Pythia-70M's shape, then SmolLM2-135M's.
# Usage: bash benchmarks/prefill_chunked/run.sh [GGUF]    GGUF: SmolLM2-135M's weights; random ones of its shape without
# THREADS (default 2), ROUNDS (default 3), TOKENS (default "8192 16384 32768"), PRESS (default snapkv), LAYERS (default 6):
# SmolLM2's thirty layers are all alike, so a few of them have the ratios. Nothing else should run on the machine.
# RESULTS=benchmarks/prefill_chunked/results, then python scripts/generate_docs.py: the tables of the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
read -ra tokens <<< "${TOKENS:-8192 16384 32768}"
read -ra press <<< "${PRESS:-snapkv}"
measure=("${PYTHON:-.venv/bin/python}" -m benchmarks.prefill_chunked.prefill_chunked --threads "${THREADS:-2}"
  --rounds "${ROUNDS:-3}" --tokens "${tokens[@]}" --press "${press[@]}")
results=${RESULTS:-results/prefill_chunked}
"${measure[@]}" --model pythia-70m --output "$results/pythia-70m.json"
"${measure[@]}" --model smollm2-135m --layers "${LAYERS:-6}" ${1:+--gguf "$1"} --output "$results/smollm2-135m.json"
