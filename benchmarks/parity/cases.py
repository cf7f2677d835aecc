"""What is compared: how each press is made, in both libraries by the same words, and why results differ where they do.

A case without a reason has to agree. A case with one has to differ somewhere, or the reason is out of date; if the
faulty expression of kvpress can be repaired in a few lines (``repaired.py``), results have to agree once it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from benchmarks.parity.models import TINY

RATIOS = (0.25, 0.5, 0.75)


class Missing(Exception):
    """A library has no class of this name."""


class Library:
    """The classes of a library, or of the first of several modules that has them."""

    def __init__(self, *modules: ModuleType):
        self._modules = modules

    def __getattr__(self, name: str) -> Any:
        for module in self._modules:
            if hasattr(module, name):
                return getattr(module, name)
        raise Missing(f"{self._modules[-1].__name__} has no {name}")


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: how the table calls it.
        make: the press, from a library, a ratio and a model.
        why: what makes the results differ: a fault of kvpress, or a statement of the paper that coldpress follows.
        letter: of that fault in the project's list; empty for a statement of the paper or a decision of coldpress.
        repaired: ``repaired.py`` has what takes the difference away.
        ratios: what ``make`` is called with.
        models: those that it is run on.
        rows: 1 or 2 texts in a batch.
        decode: tokens that are decoded under the press before anything is compared.
        scope: which pairs compete with each other, where ties are looked for: those of a head or of a layer.
        one_by_one: score one token at a time: kvpress cannot mask several when layers differ in length (fault C).
        rerotated: kvpress counts positions from the compressed length on.
        kvpress_attention: the implementation that kvpress needs.
        breaks: models on which kvpress raises an error, and the letter and description of that fault.
        not_compared: why the case cannot be run at all.
    """

    name: str
    make: Callable[[Library, float, PreTrainedModel], Any]
    why: str = ""
    letter: str = ""
    repaired: bool = False
    ratios: tuple[float, ...] = RATIOS
    models: tuple[str, ...] = ()
    rows: int = 1
    decode: int = 0
    scope: str = "head"
    one_by_one: bool = False
    rerotated: bool = False
    kvpress_attention: str = "sdpa"
    breaks: tuple[str, ...] = ()
    breaks_why: str = ""
    not_compared: str = ""

    def runs_on(self, model: str) -> bool:
        return not self.not_compared and (not self.models or model in self.models)


def _snapkv(p: Library, r: float = 0.0, window: int = 16) -> Any:
    return p.SnapKVPress(r, window_size=window)


def _expected(p: Library, r: float = 0.0, **parameters: Any) -> Any:
    return p.ExpectedAttentionPress(r, **parameters)


_SINKS = (
    "the paper's attention is a softmax over all keys (section 3); kvpress leaves the sinks out of its denominator, "
    "which shifts the weights of the heads of a group against each other"
)
_NO_HEAD_DIM = "kvpress reads config.head_dim, which this model's configuration does not have (table, section 1)"
_ARTEFACT = "needs weights, statistics or a pattern that only a hub has"

CASES = [
    Case("no_press", lambda p, r, m: None, ratios=(0.0,)),
    # -- scorers
    Case(
        "random",
        lambda p, r, m: p.RandomPress(r, seed=3),
        why="with a seed kvpress draws the same numbers in every layer",
        letter="K",
        repaired=True,
    ),
    Case("knorm", lambda p, r, m: p.KnormPress(r)),
    Case("keydiff", lambda p, r, m: p.KeyDiffPress(r)),
    Case("streaming_llm", lambda p, r, m: p.StreamingLLMPress(r)),
    Case("snapkv", lambda p, r, m: _snapkv(p, r)),
    Case(
        "snapkv, budget below the window",
        lambda p, r, m: _snapkv(p, r, window=100),
        ratios=(0.75,),
        models=TINY,
        why="all tokens of the window tie, so that an arbitrary part of it is kept and nothing else",
        letter="K",
        repaired=True,
    ),
    Case("pyramidkv", lambda p, r, m: p.PyramidKVPress(r, window_size=16, beta=2), one_by_one=True),
    Case("tova", lambda p, r, m: p.TOVAPress(r)),
    Case("observed_attention", lambda p, r, m: p.ObservedAttentionPress(r), kvpress_attention="eager"),
    Case("expected_attention", lambda p, r, m: _expected(p, r), why=_SINKS, repaired=True),
    Case("expected_attention, no sinks", lambda p, r, m: _expected(p, r, n_sink=0)),
    Case("cap", lambda p, r, m: p.CapPress(r)),
    Case("lagkv", lambda p, r, m: p.LagKVPress(r, lag_size=16)),
    Case("lagkv, cross_scoring", lambda p, r, m: p.LagKVPress(r, lag_size=16, cross_scoring=True)),
    Case(
        "lagkv, short text",
        lambda p, r, m: p.LagKVPress(r, lag_size=1024),
        ratios=(0.25, 0.3125, 0.375),  # the protected half fits
        why="the branch called no compression keeps the newest tokens, whatever they say",
        letter="K",
        repaired=True,
    ),
    Case("cur", lambda p, r, m: p.CURPress(r)),
    Case(
        "cur, short last window",
        lambda p, r, m: p.CURPress(r, local_window_size=36),
        why="norms are divided by the window's sum instead of its mean, so that a shorter last window gets too much",
        letter="K",
        repaired=True,
    ),
    Case("non_causal_attention", lambda p, r, m: p.NonCausalAttnPress(r, chunk_size=32)),
    Case(
        "non_causal_attention, short last chunk",
        lambda p, r, m: p.NonCausalAttnPress(r, chunk_size=100),
        why="padding is masked with -1e-9 instead of -inf, and padded queries add uniform attention",
        letter="K",
        repaired=True,
    ),
    Case(
        "leverage",
        lambda p, r, m: p.LeverageScorePress(r, sketch_dimension=12),
        why="kvpress's sketch is drawn anew at every call",
        letter="K",
        repaired=True,
    ),
    Case(
        "compactor",
        lambda p, r, m: p.CompactorPress(r, chunk_size=37, sketch_dimension=12),
        why="one z-score over all heads and rows instead of one for each head; the sketch and the padding as above",
        letter="K",
        repaired=True,
    ),
    # -- wrappers
    Case("adakv_snapkv", lambda p, r, m: p.AdaKVPress(_snapkv(p, r)), scope="layer", one_by_one=True),
    Case(
        "adakv_expected_attention_e2",
        lambda p, r, m: p.AdaKVPress(_expected(p, r, epsilon=1e-2)),
        scope="layer",
        one_by_one=True,
        why=_SINKS,
        repaired=True,
    ),
    Case(
        "critical_snapkv",
        lambda p, r, m: p.CriticalKVPress(_snapkv(p, r)),
        breaks=("qwen2",),
        breaks_why=_NO_HEAD_DIM,
    ),
    Case(
        "critical_adakv_snapkv",
        lambda p, r, m: p.CriticalAdaKVPress(_snapkv(p, r)),
        scope="layer",
        one_by_one=True,
        breaks=("qwen2",),
        breaks_why=_NO_HEAD_DIM,
    ),
    Case("chunk_knorm", lambda p, r, m: p.ChunkPress(p.KnormPress(r), chunk_length=32)),
    Case(
        "chunk_snapkv",
        lambda p, r, m: p.ChunkPress(_snapkv(p, r, window=4), chunk_length=32),
        why="every chunk is scored at the positions of the last one; and coldpress gives each chunk a share of its "
        "unprotected tokens",
        letter="K",
        repaired=True,
    ),
    Case("chunkkv_knorm", lambda p, r, m: p.ChunkKVPress(p.KnormPress(r), chunk_length=10)),
    Case("chunkkv_snapkv", lambda p, r, m: p.ChunkKVPress(_snapkv(p, r, window=20), chunk_length=20)),
    Case(
        "chunkkv_knorm, two rows",
        lambda p, r, m: p.ChunkKVPress(p.KnormPress(r), chunk_length=10),
        rows=2,
        why="the chunks of row 0 are kept in every row",
        letter="E",
        repaired=True,
    ),
    Case("block_keydiff", lambda p, r, m: p.BlockPress(p.KeyDiffPress(r), block_size=16)),
    Case(
        "rerotated_streaming_llm", lambda p, r, m: p.KeyRerotationPress(p.StreamingLLMPress(r)), rerotated=True
    ),
    Case("rerotated_knorm", lambda p, r, m: p.KeyRerotationPress(p.KnormPress(r)), rerotated=True),
    Case(
        "per_layer_knorm",
        lambda p, r, m: p.PerLayerCompressionPress(p.KnormPress(), _falling(r, m)),
        one_by_one=True,
    ),
    Case(
        "composed, knorm and snapkv",
        lambda p, r, m: p.ComposedPress([p.KnormPress(r / 2), _snapkv(p, r / 2)]),
        why="pairs are gathered in the order of scores, so that the second press protects a window of other tokens; "
        "and coldpress lets every press score the whole text",
        letter="B4",
        repaired=True,
    ),
]


def _falling(ratio: float, model: PreTrainedModel) -> list[float]:
    """A ratio for every layer, from 1.25 times ``ratio`` to 0.75 times."""
    n = model.config.num_hidden_layers
    return [round(ratio * (1.25 - 0.5 * i / (n - 1)), 4) for i in range(n)]
