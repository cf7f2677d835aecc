"""Perplexity and speed of a model with and without a press; the options are those of ``coldpress ppl``.

python evaluation/perplexity.py --dataset wikitext --press snapkv --compression_ratio 0.5 --ppl_apply_press
"""

import sys

if __name__ == "__main__":
    try:
        from coldpress.cli import main  # here, because an interrupt may come while torch is being imported

        sys.exit(main(["ppl", *sys.argv[1:]], prog="python evaluation/perplexity.py"))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
