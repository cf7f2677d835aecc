#!/usr/bin/env bash
# Milliseconds of a decoded token behind 8,192 tokens (Pythia-70M's shape) and 4,096 (SmolLM2-135M, three dtypes).
# Usage: bash benchmarks/decode_speed/run.sh [GGUF]    GGUF: SmolLM2-135M's weights, then llama.cpp is measured as well
# PYTHON must have coldpress, and xllamacpp and gguf with GGUF. Nothing else should run on the machine.
# RESULTS=benchmarks/decode_speed/results, then python scripts/generate_docs.py: the tables of the README.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS="${THREADS:-2}"
measure=("${PYTHON:-.venv/bin/python}" -m benchmarks.decode_speed.decode_speed --threads "$OMP_NUM_THREADS"
  --rounds "${ROUNDS:-12}")
results=${RESULTS:-results/decode_speed}
"${measure[@]}" --model pythia-70m --output "$results/pythia-70m.json"
for dtype in float32 bfloat16; do
    "${measure[@]/decode_speed.decode_speed/decode_speed.compiled}" --dtype "$dtype" --output "$results/compiled_$dtype.json"
done
"${measure[@]/decode_speed.decode_speed/decode_speed.compiled}" --rounds 6 --model smollm2-135m --dtype float16 --tokens 1024 \
    --new_tokens 4 --output "$results/compiled_smollm2_float16.json"
smollm2=(--model smollm2-135m --tokens 4096 --new_tokens 6 ${1:+--gguf "$1"})
"${measure[@]}" "${smollm2[@]}" --dtype float16 --compiled ${1:+--llamacpp} --output "$results/smollm2-135m-float16.json"
"${measure[@]/decode_speed.decode_speed/decode_speed.lengths}" --rounds "${ROUNDS:-8}" --model smollm2-135m \
    ${1:+--gguf "$1" --llamacpp} --output "$results/lengths.json"
for dtype in bfloat16 float32; do
    "${measure[@]}" "${smollm2[@]}" --dtype "$dtype" --compiled --output "$results/smollm2-135m-$dtype.json"
done
profile=("${PYTHON:-.venv/bin/python}" -m benchmarks.decode_speed.decode_speed --threads 1 --model smollm2-135m --tokens 4096)
OMP_NUM_THREADS=1 "${profile[@]}" --profile "coldpress, 0.5" --output "$results/profile-float32-0.5.json"
OMP_NUM_THREADS=1 "${profile[@]}" --dtype float16 --profile "coldpress, 0.9" --output "$results/profile-float16-0.9.json"
