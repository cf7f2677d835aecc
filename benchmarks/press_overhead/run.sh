#!/usr/bin/env bash
# What each press adds to a prefill of 4,096 tokens: Pythia-70M's shape, and SmolLM2-135M beside kvpress 0.5.5.
# Usage: bash benchmarks/press_overhead/run.sh [GGUF]     GGUF: SmolLM2-135M's weights; random ones of its shape without
# PYTHON must have coldpress and kvpress==0.5.5. About an hour on two CPU cores that do nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
results=${RESULTS:-results/press_overhead}
"$python" benchmarks/press_overhead/press_overhead.py --model pythia-70m --rounds 5 --output "$results/pythia-70m.json"
"$python" benchmarks/press_overhead/press_overhead.py --model smollm2-135m --rounds 2 ${1:+--gguf "$1"} \
    --output "$results/smollm2-135m.json"
