"""Perplexity and speed of a model with and without a press; the options are those of ``coldpress ppl``.

python evaluation/perplexity.py --dataset wikitext --press snapkv --compression_ratio 0.5 --ppl_apply_press
"""

import sys

from coldpress_command import main

if __name__ == "__main__":
    sys.exit(main(["ppl", *sys.argv[1:]], prog="python evaluation/perplexity.py"))
