#!/usr/bin/env bash
# Pairs in few bits, one by one: loss, time of a token, torch's operations.
# Usage: bash benchmarks/packed/run.sh WIKITEXT [GGUF PG19]    folders in the hub's layout, SmolLM2-135M's weights
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
results=${RESULTS:-results/packed}
loss=("$python" -m benchmarks.packed.loss --windows 20)
"${loss[@]}" --dataset "$1" --subset wikitext-2-raw-v1 --output "$results/loss-demo.json"
if [ -n "${2:-}" ]; then
    "${loss[@]}" --model "$2" --dataset "${3:-pg19}" --sample_idx 0 --output "$results/loss-smollm2-135m.json"
fi
rotation=("$python" -m benchmarks.packed.rotation)
"${rotation[@]}" --windows 20 --dataset "$1" --subset wikitext-2-raw-v1 --output "$results/rotation-demo.json"
if [ -n "${2:-}" ]; then
    "${rotation[@]}" --windows 8 --model "$2" --dataset "${3:-pg19}" --sample_idx 0 \
        --output "$results/rotation-smollm2-135m.json"
fi
"$python" -m benchmarks.packed.kernels --output "$results/kernels.json"
for model in pythia-70m smollm2-135m; do
    for tokens in 2048 8192; do
        "$python" -m benchmarks.packed.decode --model "$model" --tokens "$tokens" --threads 1 \
            --output "$results/decode-$model-$tokens.json"
    done
done
