"""``python -m coldpress.lm_eval ...``: the command ``lm_eval``, and the model ``coldpress`` in it.

lm-evaluation-harness has no way for a package to add a model to its command, so a program has to import
:mod:`coldpress.eval.harness` first. This does, and takes all of lm_eval's options. In Python an import of this module
is enough before ``lm_eval.simple_evaluate(model="coldpress", ...)``.
"""

from __future__ import annotations

import sys

from coldpress.errors import ColdpressError, SelfCheckError
from coldpress.eval.harness import ColdpressLM

__all__ = ["ColdpressLM", "main"]


def main() -> int:
    """Run lm_eval with the arguments of this process; errors of coldpress are one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except ColdpressError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1 if isinstance(error, SelfCheckError) else 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
