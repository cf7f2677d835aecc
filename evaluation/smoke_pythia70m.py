"""Compress a short context with KnormPress through the pipeline and print what came of it.

python evaluation/smoke_pythia70m.py [--model EleutherAI/pythia-70m]
"""

import argparse
import sys

CONTEXT = (
    "The press stood in the corner of the old mill. Every autumn the farmers brought their olives in wooden carts, and "
    "the miller weighed them, washed them, and laid them between round mats of woven grass. The first oil ran slowly, "
    "green and cloudy, and the children were allowed to dip their bread in it. "
) * 6
QUESTION = "What did the farmers bring to the mill?"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compress a short context with KnormPress and go on from it.")
    parser.add_argument("--model", default="EleutherAI/pythia-70m", help="hub id, local folder, or demo")
    parser.add_argument("--compression_ratio", type=float, default=0.5)
    parser.add_argument("--max_new_tokens", type=int, default=30)
    args = parser.parse_args()

    from transformers import pipeline

    import coldpress
    from coldpress.errors import InputError
    from coldpress.loading.models import load_model

    try:
        press = coldpress.KnormPress(compression_ratio=args.compression_ratio)
        loaded = load_model(args.model)
        pipe = pipeline("kv-press-text-generation", model=loaded.model, tokenizer=loaded.tokenizer)
        cache = coldpress.PressedCache(press)
        answer = pipe(CONTEXT, question=QUESTION, cache=cache, max_new_tokens=args.max_new_tokens)["answer"]
    except InputError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    stored = sum(cache.stored_lengths()) / len(cache.stored_lengths())
    print(f"model:    {args.model} ({loaded.model.config.model_type}, {loaded.model.dtype}, {loaded.device})")
    print(f"press:    {press}")
    print(f"context:  {cache.seen_tokens} tokens, {stored:g} stored per layer, {cache.kv_bytes():,} bytes")
    print(f"achieved: {cache.achieved_ratio():.3f} of the pairs removed")
    print(f"answer:   {answer.strip()!r}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
