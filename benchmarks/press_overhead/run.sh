#!/usr/bin/env bash
# What each press adds to a prefill of 4,096 tokens: Pythia-70M's shape, and SmolLM2-135M beside kvpress 0.5.5.
# Usage: bash benchmarks/press_overhead/run.sh [GGUF]     GGUF: SmolLM2-135M's weights; random ones of its shape without
# PYTHON must have coldpress and kvpress==0.5.5. THREADS (default 1): more only on cores that do nothing else, where
# operations otherwise wait for a thread that is not running. LAYERS: fewer of SmolLM2's 30 layers, in less time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
measure=("${PYTHON:-.venv/bin/python}" benchmarks/press_overhead/press_overhead.py --threads "${THREADS:-1}" --rounds 3)
results=${RESULTS:-results/press_overhead}
"${measure[@]}" --model pythia-70m --output "$results/pythia-70m.json"
"${measure[@]}" --model smollm2-135m ${1:+--gguf "$1"} ${LAYERS:+--layers "$LAYERS"} --output "$results/smollm2-135m.json"
new=(attention_matching_defensive attention_matching_snapkv defensive layer_defensive sampled_defensive gkv h2o
  mass_merging_snapkv momentkv_snapkv morphkv rkv snapkv)
"${measure[@]}" --rounds 5 --library coldpress --model smollm2-135m ${1:+--gguf "$1"} ${LAYERS:+--layers "$LAYERS"} \
  --press "${new[@]}" --output "$results/smollm2-135m-new.json"
"${measure[@]}" --rounds 1 --library coldpress --model smollm2-135m ${1:+--gguf "$1"} --layers 6 --press all \
  --output "$results/smollm2-135m-all.json"
