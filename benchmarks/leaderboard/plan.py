"""What the leaderboard measures: sweeps in two lanes, one process of one thread each, and when each has to be done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import coldpress.public  # noqa: F401  (what registers the presses)
from coldpress.bases.registry import press_names

RATIOS = [0.5, 0.75, 0.9, 0.95]
AT_ONE_RATIO = 0.75  # of tasks and timings
# A second pass over the text or a fit for each ratio: seconds a window, where others take a fraction of one.
SLOW = (
    "attention_matching_defensive",
    "attention_matching_kvzip",
    "attention_matching_sampled_defensive",
    "attention_matching_snapkv",
    "kvcompose",
    "kvgrad",
    "kvzip",
    "kvzip_plus",
)
LEFT_OUT = {
    "block_keydiff": "keydiff in blocks: as keydiff where memory is no matter",
    "chunk_snapkv": "snapkv in pieces: as snapkv where memory is no matter",
    "critical_expected_attention": "critical_adakv_expected_attention has it with a budget of each head",
    "critical_snapkv": "critical_adakv_snapkv has it with a budget of each head",
}
SHARES = {"fast": 0.68, "slow": 0.83, "toy": 0.92, "rest": 1.0}  # of the time, when each has to be done


@dataclass(frozen=True)
class Sizes:
    """How much is measured, where the time is enough: 60 minutes on two quiet cores end some windows earlier.

    Attributes:
        context, target: tokens that are compressed, and that are scored after them (but for the first of them).
        windows: of WikiText; a sixth of them, rounded up, of each of six books.
        slow_windows: of each text, for SLOW.
        batch: windows that are run together: 64 tokens alone leave a core waiting for the weights.
        stride: tokens between the starts of two windows, so that they lie all over the text.
        examples: of each task.
    """

    context: int = 768
    target: int = 64
    windows: int = 32
    slow_windows: int = 2
    batch: int = 4
    stride: int = 8192
    examples: int = 5


@dataclass(frozen=True)
class Stage:
    """One sweep of a lane: its name, its part of the time (a key of SHARES), and the sweep's configuration."""

    name: str
    share: str
    config: dict[str, Any]


def presses() -> tuple[list[str], list[str]]:
    """The names that are measured: the fast ones and the slow ones."""
    every = [name for name in press_names(kind="training-free", at_prefill=True) if name not in LEFT_OUT]
    return [name for name in every if name not in SLOW], [name for name in every if name in SLOW]


def lanes(
    wikitext: str, pg19: str, model: str, toy: str, sizes: Sizes, names: list[str] | None = None
) -> list[list[Stage]]:
    """The stages of both lanes.

    Args:
        wikitext, pg19: datasets: folders in the hub's layout, or hub ids.
        model, toy: the model that the board is about, and a smaller one beside it.
        names: presses; None for all.
    """
    fast, slow = presses()
    if names is not None:
        fast, slow = ([name for name in part if name in names] for part in (fast, slow))
    of_a_book = -(-sizes.windows // 6)
    n_slow = sizes.slow_windows
    texts = {
        "pg19": (
            {"dataset": pg19, "max_documents": 6, "max_windows": of_a_book},
            {"dataset": pg19, "max_documents": min(6, n_slow), "max_windows": -(-n_slow // 6)},
        ),
        "wikitext": (
            {"dataset": wikitext, "subset": "wikitext-103-v1", "max_windows": sizes.windows},
            {"dataset": wikitext, "subset": "wikitext-103-v1", "max_windows": n_slow},
        ),
    }
    if wikitext == "demo":  # to try the command out
        texts = {
            "demo": ({"dataset": "demo", "max_windows": sizes.windows}, {"dataset": "demo", "max_windows": n_slow})
        }

    def quality(of: str, text: dict[str, Any], which: list[str], batch: int) -> dict[str, Any]:
        return {
            "models": [{"model": of}],
            "texts": [text],
            "press": which,
            "compression_ratio": RATIOS,
            "perplexity": {
                "context_tokens": sizes.context,
                "target_tokens": sizes.target,
                "stride": sizes.stride,
                "batch_size": batch,
            },
        }

    found = []
    for text, (many, few) in texts.items():
        stages = []
        for of, share, share_slow in ((model, "fast", "slow"), (toy, "toy", "toy")):
            if fast:
                stages.append(Stage(f"{_short(of)}-{text}", share, quality(of, many, fast, sizes.batch)))
            if slow:
                stages.append(Stage(f"{_short(of)}-{text}-slow", share_slow, quality(of, few, slow, 1)))
        found.append(stages)
    at_one = {"models": [{"model": model}], "press": fast + slow, "compression_ratio": [AT_ONE_RATIO]}
    first_text = next(iter(texts.values()))[0]
    timed = {"context_limit": sizes.context, "max_new_tokens": 16, "repetitions": 2, "warmup": 0}
    found[0].append(Stage("speed", "rest", {**at_one, "texts": [first_text], "speed": timed}))
    asked = {"task": ["niah_single", "niah_multikey"], "task_tokens": [512], "task_examples": sizes.examples}
    if fast:
        found[-1].append(Stage("tasks", "rest", {**at_one, "press": fast, "tasks": asked}))
    return found


def _short(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
