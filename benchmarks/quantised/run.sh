#!/usr/bin/env bash
# The cache in few bits: beside transformers' QuantizedCache, after presses, and its speed.
# Usage: bash benchmarks/quantised/run.sh [WIKITEXT [GGUF PG19]]    folders in the hub's layout, SmolLM2-135M's weights
# PYTHON must have coldpress and, to compare with them, optimum-quanto and hqq. SPEED=1 measures speed too: only on a
# machine that does nothing else.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-.venv/bin/python}"
results=${RESULTS:-results/quantised}
wikitext=${1:-wikitext}
text=(--model demo --dataset "$wikitext" --subset wikitext-2-raw-v1)
"$python" benchmarks/quantised/quantised.py "${text[@]}" --windows 16 --output "$results/demo.json"
if [ -n "${2:-}" ]; then
    "$python" benchmarks/quantised/quantised.py --model "$2" --dataset "${3:-pg19}" --sample_idx 0 --windows 6 \
        --output "$results/smollm2-135m.json"
fi
presses=(--press no_press streaming_llm snapkv adakv_snapkv --compression_ratio 0.5)
quality=(--ppl_apply_press --ppl_only --limit_tokens 40960 --output_dir "$results/presses")
"$python" evaluation/perplexity.py "${text[@]}" "${presses[@]}" "${quality[@]}"
"$python" evaluation/perplexity.py "${text[@]}" "${presses[@]}" "${quality[@]}" --kv_bits 8 4 2
if [ -n "${SPEED:-}" ]; then
    speed=(--speed_only --context_limit 768 --max_new_tokens 200 --output_dir "$results/speed")
    "$python" evaluation/perplexity.py "${text[@]}" "${presses[@]}" "${speed[@]}"
    "$python" evaluation/perplexity.py "${text[@]}" "${presses[@]}" "${speed[@]}" --kv_bits 8 4 2
fi
