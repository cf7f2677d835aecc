"""What a press is: something that looks at one layer and says which pairs are kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.budget import check_ratio, keep_count, select, shrink_protected
from coldpress.errors import PressError
from coldpress.presses.definition import PressType, as_given, not_called
from coldpress.view import Kept, LayerView, Place

if TYPE_CHECKING:
    from coldpress.cache import PressedCache

__all__ = [
    "BUDGETS",
    "BasePress",
    "BudgetPress",
    "ScorerPress",
    "check_at_least",
    "check_between",
    "no_scorer",
    "numbers_of",
    "parts",
    "require_block",
    "require_one_layer",
    "require_rerotatable",
    "require_text",
]

BUDGETS = ("budget_tokens", "budget_bytes")  # what may say how much is kept, instead of a ratio
_B = TypeVar("_B", bound="BasePress")
_S = TypeVar("_S", bound="BudgetPress")


class BasePress(metaclass=PressType):
    """A way to compress the pairs of one layer. Presses are immutable; what a run accumulates lives in the cache.

    Use one in a cache, ``PressedCache(press)``, or around calls of a model, as in kvpress::

        with press(model):
            model(input_ids, cache=cache)

    The class says what kind of method it is; the catalogue (``coldpress presses``) shows it:

    Attributes:
        kind: ``training-free``; ``calibrated``: needs statistics of the model, taken from a text; ``trained``: needs
            weights of its own that were trained for the model.
        at_prefill: compresses the prompt; if not, only what comes after it, as a decoding schedule does.
        decodes: can choose among the pairs of a text that goes on, so that a decoding schedule may use it.
        per_head, per_layer: heads of a layer, or layers, may keep different numbers of pairs.
        has_ratio: takes a ``compression_ratio``; if not, parameters of its own and the text decide how much is kept.
        needs_hidden_states: looks at ``view.hidden_states``: the prefill has to run inside ``with press(model):``. A
            wrapper need not say it for the press inside it.
        needs_model: runs the model by itself after the prefill (:meth:`finish`), inside ``with press(model):`` too.
        heads_alone: chooses for each KV head by what that head holds and is asked, so that heads may be apart.
            Not inherited; every class says so for itself.
        chooses_together: chooses among the pairs of all layers when the prefill is over (:meth:`choose_together`),
            inside ``with press(model):`` too.
    """

    kind: ClassVar[Literal["training-free", "calibrated", "trained"]] = "training-free"
    at_prefill: ClassVar[bool] = True
    decodes: ClassVar[bool] = False
    per_head: ClassVar[bool] = False
    per_layer: ClassVar[bool] = False
    has_ratio: ClassVar[bool] = False
    needs_hidden_states: ClassVar[bool] = False
    needs_model: ClassVar[bool] = False
    heads_alone: ClassVar[bool] = False
    chooses_together: ClassVar[bool] = False

    def compress(self, view: LayerView) -> Kept | None:
        """What is kept of ``view``, right after the prefill; None keeps everything."""
        raise NotImplementedError(f"{type(self).__name__} must define compress(view)")

    def prepared(self: _B, model: PreTrainedModel, tokenizer: Any = None) -> _B:
        """The same press with what it and those inside it need to know of ``model``, asked for before that runs.

        Args:
            model: what will run the prefill.
            tokenizer: the model's, where somebody has it at hand.

        Raises:
            PressError: something is missing; says how to get it.
        """
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            for press in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(press, BasePress) and (ready := press.prepared(model, tokenizer)) is not press:
                    before = found.get(name, value)
                    if isinstance(value, (list, tuple)):
                        found[name] = tuple(ready if own is press else own for own in before)
                    else:
                        found[name] = ready
        return replace(self, **found) if found else self  # type: ignore[type-var]

    def check_prefill(self, token_ids: Tensor, has_padding: bool) -> None:
        """Raise :class:`PressError` if :meth:`finish` could not compress this prefill; asked before it begins."""

    def finish(self, cache: PressedCache, model: nn.Module, token_ids: Tensor) -> None:
        """Compress ``cache``, which holds all of the prefill, with the help of the model; for ``needs_model`` presses.

        Runs without gradients unless it asks for them; what it runs of the model is no prefill to anybody.

        Args:
            cache: what to compress, by :meth:`coldpress.layer.PressedLayer.keep` of each of its layers.
            model: the model without its head; ``model(input_ids=..., cache=cache.fork())`` runs it, and
                ``session.look`` of the fork's session is shown each of its attention calls.
            token_ids: int64 ``[B, T]``, what the prefill was given.
        """
        raise NotImplementedError(f"{type(self).__name__} must define finish(cache, model, token_ids)")

    def choose_together(self, cache: PressedCache) -> None:
        """Compress ``cache``, which holds all of the prefill, by what :meth:`compress` had its pairs carry.

        For ``chooses_together`` presses, whose :meth:`compress` keeps everything, with a number for each pair
        (``Kept.carry``); ``layer.carried()`` gives these back, and ``layer.keep(slots)`` evicts.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose_together(cache)")

    @property
    def leaves_keys(self) -> bool:
        """Whether the keys that are kept are held as the model made them."""
        return True

    # -- a press that goes on while decoding (see DecodingPress) ---------------------------------------------------

    @property
    def n_recent_queries(self) -> int:
        """How many of the newest tokens' queries a layer remembers for :meth:`compress_again`; 0: never called."""
        return 0

    def is_due(self, n_new: int) -> bool:
        """Whether a row that has got ``n_new`` tokens since it was last compressed is compressed now."""
        return False

    def compress_again(self, view: LayerView) -> Kept | None:
        """What is kept of ``view``, which holds what is left of the text so far; None keeps all of it."""
        raise NotImplementedError(f"{type(self).__name__} must define compress_again(view)")

    # -- a press that judges tokens as they come, and evicts them later (see DMSPress) -----------------------------

    @property
    def n_waiting(self) -> int:
        """How many of the newest tokens stay whatever :meth:`judge` has said of them; 0: it is never called."""
        return 0

    @property
    def judges_prompt(self) -> bool:
        """Whether the tokens of the prefill are judged too; then :meth:`compress` is not called."""
        return False

    def judge(self, view: LayerView) -> Tensor:
        """Which tokens of ``view``, those that have just come, stay when they are no longer new: bool ``[B, Hkv, n]``.

        The view holds all rows of the batch, with their padding, of which it does not matter what is said.
        """
        raise NotImplementedError(f"{type(self).__name__} must define judge(view)")

    @property
    def goes_on(self) -> bool:
        """Whether it compresses what comes after the prefill too."""
        return bool(self.n_recent_queries or self.n_waiting)

    if not TYPE_CHECKING:  # else any name at all would be an attribute to a type checker

        def __getattr__(self, name: str) -> Any:
            own = type(self).__name__
            raise AttributeError(not_called(own, name) or f"{own!r} object has no attribute {name!r}")

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Compress every cache that ``model`` prefills inside the block. See :func:`coldpress.pressing.pressed`."""
        from coldpress.pressing import pressed

        with pressed(model, self):
            yield model


@dataclass(frozen=True)
class BudgetPress(BasePress):
    """A press that is told how many pairs to keep; :class:`ScorerPress` for those that score one layer at a time.

    Args:
        compression_ratio: fraction of the pairs to remove, in [0, 1).
        budget_tokens: pairs that a head keeps at most, on average over heads and layers; instead of a ratio.
        budget_bytes: bytes that the kept keys and values of one row take at most, in all compressed layers together;
            instead of a ratio.
    """

    has_ratio = True

    exact_at_0: ClassVar[bool] = True  # at ratio 0 the cache is the uncompressed one

    compression_ratio: float = 0.0
    budget_tokens: int | None = field(default=None, kw_only=True)
    budget_bytes: int | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__repr__ = BudgetPress.__repr__  # type: ignore[method-assign]  # dataclass would make one of its own

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if f.repr and (f.name not in BUDGETS or getattr(self, f.name) is not None)]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    def __post_init__(self) -> None:
        check_ratio(self.compression_ratio)
        check_budget(self)

    def keep_of(self, n_tokens: int, place: Place) -> int:
        """How many of ``n_tokens`` pairs a head of the layer at ``place`` keeps: the mean if its heads differ."""
        return self.mean_keep(n_tokens, place)

    def mean_keep(self, n_tokens: int, place: Place) -> int:
        """How many of ``n_tokens`` pairs a head keeps, mean over heads and layers: the budget as its user gave it.

        Raises:
            PressError: ``budget_bytes`` is less than one token takes.
        """
        if self.budget_tokens is not None:
            return min(n_tokens, self.budget_tokens)
        if self.budget_bytes is not None:
            token_bytes = place.n_layers * place.token_bytes
            if self.budget_bytes < token_bytes:
                raise PressError(
                    f"budget_bytes={self.budget_bytes} is less than the {token_bytes} bytes of one token in "
                    f"{place.n_layers} layers."
                )
            return min(n_tokens, self.budget_bytes // token_bytes)
        return keep_count(n_tokens, self.compression_ratio)

    def layers_differ(self) -> bool:
        """Whether :meth:`keep_of` depends on the layer."""
        return type(self).keep_of is not BudgetPress.keep_of

    def keep(self, view: LayerView) -> int:
        """How many pairs a head of this layer keeps, 1 <= n <= T: the mean if its heads differ."""
        if view.n_counted is not None:  # in a prefill in pieces
            return min(view.n_tokens, self.keep_of(view.n_counted, view.place))
        if view.positions is None:
            return self.keep_of(view.n_tokens, view.place)
        return min(view.n_tokens, self.keep_of(view.end, view.place))  # while decoding: of the text so far

    def with_ratio(self: _S, compression_ratio: float) -> _S:
        """The same press at another ratio, which takes the place of any budget."""
        return self.with_budget(compression_ratio=compression_ratio)

    def with_budget(self: _S, **budget: Any) -> _S:
        """The same press with ``compression_ratio``, ``budget_tokens`` or ``budget_bytes`` instead of what it had."""
        nothing: dict[str, Any] = {"compression_ratio": 0.0, "budget_tokens": None, "budget_bytes": None}
        return replace(self, **(nothing | budget))


@dataclass(frozen=True)
class ScorerPress(BudgetPress):
    """Keep the pairs with the largest scores; subclasses define :meth:`score`.

    Three questions, each with a method of its own, so that wrappers can change one and leave the others alone: which
    pairs matter (:meth:`scores`), how many are kept (:meth:`keep_of`, :meth:`protected`), which ones these are
    (:meth:`choose`). Only a press that stores something else than the chosen pairs overrides :meth:`compress`.

    Args:
        compression_ratio, budget_tokens, budget_bytes: as in :class:`BudgetPress`.
    """

    decodes = True

    estimates_attention: ClassVar[bool] = False  # scores are attention weights: not negative, comparable across heads
    needs_all_queries: ClassVar[bool] = False  # score(view) needs the query of every token of the view
    scores_alone: ClassVar[bool] = False  # a score depends on its own token only, so that it can be given at once

    def score(self, view: LayerView) -> Tensor:
        """Scores ``[B, Hkv, T]`` in float32; larger = keep. Must not depend on ``compression_ratio``."""
        raise NotImplementedError(f"{type(self).__name__} must define score(view)")

    def protected(self, view: LayerView) -> tuple[int, int]:
        """How many of the first and of the last tokens of the text are kept whatever their score."""
        return 0, 0

    def scores(self, view: LayerView) -> Tensor:
        """What :meth:`choose` goes by: :meth:`score`, computed once per view for all ratios."""
        score = self._checked_score if view.counts is None else self._by_head
        return view.once(self.with_ratio(0.0), lambda: score(view))

    def _checked_score(self, view: LayerView) -> Tensor:
        scores = self.score(view)
        if scores.shape != view.keys.shape[:3]:
            raise PressError(
                f"{type(self).__name__}.score returned {list(scores.shape)}, and has to return a number for each KV "
                f"head and token: {list(view.keys.shape[:3])}."
            )
        return scores

    def _by_head(self, view: LayerView) -> Tensor:
        """Scores of a view whose heads hold different numbers of pairs; minus infinity in empty slots."""
        scores = torch.full(view.keys.shape[:3], -torch.inf, device=view.keys.device)
        for row, head in itertools.product(*(range(n) for n in scores.shape[:2])):
            own = self._checked_score(view.of_head(row, head))[0, 0]
            scores[row, head, : len(own)] = own
        return scores

    def forced(self, view: LayerView, n_keep: int) -> tuple[int, int]:
        """Tokens at the two ends of ``view`` that are kept when ``n_keep`` are: the protected ones that are in it."""
        n_sink, n_window = self.protected(view)
        if view.positions is None:
            n_sink = max(0, n_sink - view.first_position)
        return shrink_protected(n_keep, n_sink, min(n_window, view.n_tokens))

    def choose(self, view: LayerView) -> Tensor | None:
        """Positions in ``view`` of the pairs that are kept.

        Returns:
            int64 ``[B, Hkv, n]``, ascending; -1 in the last places of a head that keeps fewer than the longest. None
            keeps everything.
        """
        n_keep = self.keep(view)
        if n_keep >= view.n_tokens:
            return None
        return view.held(select(view.guard(self.scores(view), *self.forced(view, n_keep)), n_keep))

    def compress(self, view: LayerView) -> Kept | None:
        positions = self.choose(view)
        return None if positions is None else view.take(positions)


def require_block(press: BasePress, needed: object) -> None:
    """Raise :class:`PressError` if what a press needs of the model is not there, because nothing has shown it."""
    if needed is None:
        what, how = "looks at hidden states, which a cache by itself is not shown", ""
        if press.needs_model:
            what, how = "runs the model again on the tokens of the prefill", ", with input_ids"
        raise PressError(f"{type(press).__name__} {what}: run the prefill inside 'with press(model):'{how}.")


def require_text(press: BasePress, given: Mapping[str, Any]) -> None:
    """Raise :class:`PressError` unless a call brings a text and nothing else: all that a second run of it is shown.

    Args:
        given: the call's arguments by name.
    """
    for name, value in given.items():
        if isinstance(value, Tensor):
            at = torch.arange(value.shape[-1], device=value.device) if name == "position_ids" else value
            is_more = bool((value != at).any()) or (name != "attention_mask" and value.is_floating_point())
        else:  # images that were encoded already
            is_more = isinstance(value, Mapping) and any(part is not None for part in value.values())
        if is_more:
            raise PressError(
                f"{type(press).__name__} runs the model on the text again and was given {name} that are more than its "
                "tokens in order, such as an image; use a press that does not, such as SnapKVPress."
            )


def parts(press: BasePress) -> Iterator[BasePress]:
    """The press and all presses inside it."""
    yield press
    for value in vars(press).values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, BasePress):
                yield from parts(inner)


def require_one_layer(outer: BasePress, press: object) -> None:
    """Raise :class:`PressError` if ``press`` cannot be asked about one layer at a time, as ``outer`` would."""
    if isinstance(press, BasePress) and press.needs_model:
        raise PressError(
            f"{type(outer).__name__} asks a press about one layer at a time, and {type(press).__name__} chooses among "
            "the pairs of all layers after running the model again; use it by itself."
        )


def require_rerotatable(press: BasePress) -> None:
    """Raise :class:`PressError` unless a cache can move up the keys that ``press`` keeps."""
    for part in parts(press):
        name = type(part).__name__
        if not part.leaves_keys:
            why = f"{name} changes the keys that it keeps"
        elif part.needs_model or part.chooses_together:
            why = f"{name} chooses among the pairs of all layers when the prefill is over"
        elif part.n_waiting:
            why = f"{name} evicts token by token"
        else:
            continue
        raise PressError(
            f"positions='rerotate' moves keys up whenever a layer is cut back, and {why}; leave positions out, or use "
            "a scorer or DecodingPress around one."
        )


def no_scorer(press: object) -> str:
    """What was given where a press with scores and a budget is needed, and what to do with it instead."""
    if not isinstance(press, BasePress):
        return as_given(press)
    name = type(press).__name__
    if press.goes_on:
        return f"{name}, which says when pairs are evicted and not which; put it outside"
    if press.chooses_together:
        return f"{name}, which chooses among the pairs of all layers; use it by itself"
    return f"{name}, which has no ratio and no scores that others could choose by; use it by itself"


def check_budget(press: BudgetPress) -> None:
    """Raise :class:`PressError` unless at most one of ratio, tokens and bytes says how much is kept."""
    check_at_least(press, 1, *(name for name in BUDGETS if getattr(press, name) is not None))
    given = [name for name in ("compression_ratio", *BUDGETS) if getattr(press, name)]
    if len(given) > 1:
        raise PressError(f"{type(press).__name__}: {' and '.join(given)} both say how much is kept; give one of them.")


def check_at_least(press: BasePress, minimum: int, *names: str) -> None:
    """Raise :class:`PressError` unless the named fields are integers of at least ``minimum``, and below 2**62."""
    for name in names:
        value = getattr(press, name)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**62:
            below = "" if isinstance(value, float) or not isinstance(value, int) or value < minimum else " and < 2**62"
            raise PressError(f"{type(press).__name__}: {name} must be an integer >= {minimum}{below}, got {value!r}.")


def check_between(press: BasePress, low: float, high: float, *names: str) -> None:
    """Raise :class:`PressError` unless the named fields are numbers from ``low`` to ``high``, both included."""
    for name in names:
        value = getattr(press, name)
        fits = isinstance(value, float) or (type(value) is int and abs(value) < 2**62)  # torch holds no longer ones
        if not fits or not low <= value <= high:
            allowed = f">= {low}" if high == float("inf") else f"in [{low}, {high}]"
            raise PressError(f"{type(press).__name__}: {name} must be a number {allowed}, got {value!r}.")


def numbers_of(press: BasePress, name: str, values: Any, n_dims: int) -> tuple[Any, ...]:
    """A table of numbers as tuples in tuples, ``n_dims`` deep, so that presses can be compared and hashed.

    Raises:
        PressError: ``values`` is not a tensor, array or list of so many dimensions, is empty, or is not finite.
    """
    try:
        table = torch.as_tensor(values, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        table = torch.empty(0)
    if table.dim() != n_dims or not table.numel() or not table.isfinite().all():
        raise PressError(
            f"{type(press).__name__}: {name} must be a tensor or lists of finite numbers with {n_dims} dimensions."
        )

    def tuples(part: Any) -> Any:
        return tuple(map(tuples, part)) if isinstance(part, list) else part

    found: tuple[Any, ...] = tuples(table.tolist())
    return found
