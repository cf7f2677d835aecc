#!/usr/bin/env bash
# The embedded GPT-NeoX on WikiText-2 (raw, test), nine presses at three ratios.
# Usage: bash benchmarks/demo_wikitext2/run.sh [DATASET]     DATASET: wikitext (default) or a folder in the hub's layout
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
"${PYTHON:-.venv/bin/python}" evaluation/perplexity.py --model demo --dataset "${1:-wikitext}" --subset wikitext-2-raw-v1 \
    --press no_press expected_attention keydiff knorm observed_attention pyramidkv random snapkv streaming_llm tova \
    --compression_ratio 0.25 0.5 0.75 --ppl_apply_press --ppl_only --output_dir results/demo_wikitext2
