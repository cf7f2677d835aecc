"""Press: what a cache asks of a press. New presses derive from BasePress or ScorerPress (``bases/``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from coldpress.core.column import Column
from coldpress.core.definition import PressType, not_called
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView

__all__ = ["Press", "parts"]

_B = TypeVar("_B", bound="Press")


class Press(metaclass=PressType):
    """A way to compress the pairs of one layer. Presses are immutable; what a run accumulates lives in the cache.

    Use one in a cache, ``PressedCache(press)``, or around calls of a model, as in kvpress::

        with press(model):
            model(input_ids, cache=cache)

    The class says what kind of method it is; the catalogue (``coldpress presses``) shows it:

    Attributes:
        kind: ``training-free``; ``calibrated``: needs statistics of the model, taken from a text; ``trained``: needs
            weights of its own that were trained for the model.
        at_prefill: compresses the prompt; if not, only what comes after it, as a decoding schedule does.
        can_rechoose: can choose among the pairs of a text that goes on, so that a decoding schedule may use it.
        per_head, per_layer: heads of a layer, or layers, may keep different numbers of pairs.
        has_ratio: takes a ``compression_ratio``; if not, parameters of its own and the text decide how much is kept.
        per_head_independent: chooses for each KV head by its own pairs and queries, and as many pairs for each,
            so that heads may be apart. Inherited inside coldpress only, where a test compares what a class says with
            what it does; any other class says so for itself.
        offers_choice: says which pairs of a layer are kept (``choose``) and how many (``keep_of``): it may be wrapped.
        offers_scores: that choice is the best of its ``scores``, so that another press may choose by them.
        pointwise: a score depends on its own token only, so that it can be given as soon as the token comes.
        needs_all_queries: scores need the query of every token of the view.
        columns: what each pair carries for the press (:meth:`observe`), beside its key and value.
        observes: is shown every attention call (:meth:`observe`).
        observes_later: those after the prompt too.
        reads_part: says which pairs a decoding query reads (:meth:`select`).
        implied: of a method, what a class that defines it is taken to say of itself unless it says otherwise. So a
            subclass with another method makes no claim that was true of the one it replaces.
    """

    kind: ClassVar[Literal["training-free", "calibrated", "trained"]] = "training-free"
    at_prefill: ClassVar[bool] = True
    can_rechoose: ClassVar[bool] = False
    per_head: ClassVar[bool] = False
    per_layer: ClassVar[bool] = False
    has_ratio: ClassVar[bool] = False
    per_head_independent: ClassVar[bool] = False
    offers_choice: ClassVar[bool] = False
    offers_scores: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False
    needs_all_queries: ClassVar[bool] = False
    columns: ClassVar[tuple[Column, ...]] = ()
    observes: ClassVar[bool] = False
    observes_later: ClassVar[bool] = True
    reads_part: ClassVar[bool] = False
    implied: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "observe": {"observes": True},
        "select": {"reads_part": True},
    }

    # -- traits that parameters may decide; a class may as well set them as attributes ------------------------------

    @property
    def needs_hidden_states(self) -> bool:
        """Whether it looks at ``view.hidden_states``: the prefill has to run inside ``with press(model):``.

        A wrapper need not say it for the press inside it.
        """
        return False

    @property
    def adds_bytes(self) -> int:
        """Bytes that it adds to each pair that a head keeps, beside key and value: 4 for a bias."""
        return 0

    @property
    def needs_model(self) -> bool:
        """Whether it runs the model by itself after the prefill (:meth:`finish`), inside ``with press(model):`` too."""
        return False

    @property
    def chooses_together(self) -> bool:
        """Whether it chooses among the pairs of all layers when the prefill is over (:meth:`choose_together`).

        Inside ``with press(model):`` too.
        """
        return False

    @property
    def estimates_attention(self) -> bool:
        """Whether scores are attention weights: not negative, comparable across heads, and not weighed by values."""
        return False

    @property
    def draws(self) -> bool:
        """Whether it draws numbers by ``view.seed``, so that a copy of a cache has to have its seed."""
        return False

    @property
    def changes(self) -> frozenset[str]:
        """What it changes of the pairs that the model made: ``keys``, ``values``, or ``channels`` of keys."""
        return frozenset()

    def compress(self, view: LayerView) -> Kept | None:
        """What is kept of ``view``, right after the prefill; None keeps everything."""
        raise NotImplementedError(f"{type(self).__name__} must define compress(view)")

    def prepared(self: _B, model: PreTrainedModel, tokenizer: Any = None) -> _B:
        """The same press with what it and those inside it need to know of ``model``, asked for before that runs.

        Args:
            model: what will run the prefill.
            tokenizer: the model's, where it is at hand.

        Raises:
            PressError: something is missing; says how to get it.
        """
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            for press in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(press, Press) and (ready := press.prepared(model, tokenizer)) is not press:
                    before = found.get(name, value)
                    if isinstance(value, (list, tuple)):
                        found[name] = tuple(ready if own is press else own for own in before)
                    else:
                        found[name] = ready
        return replace(self, **found) if found else self  # type: ignore[type-var]

    def check_prefill(self, token_ids: Tensor, has_padding: bool) -> None:
        """Raise :class:`PressError` if :meth:`finish` could not compress this prefill; asked before it begins."""

    def finish(self, cache: Any, model: nn.Module, token_ids: Tensor) -> None:
        """Compress ``cache``, which stores all of the prefill, with the help of the model; for ``needs_model`` presses.

        Runs without gradients unless it asks for them; what it runs of the model is no prefill to anybody.

        Args:
            cache: what to compress, by :meth:`coldpress.cache.layer.PressedLayer.keep` of each of its layers.
            model: the model without its head; ``model(input_ids=..., cache=cache.fork())`` runs it, and
                ``session.on_attention`` of the fork's session is shown each of its attention calls.
            token_ids: int64 ``[B, T]``, what the prefill was given.
        """
        raise NotImplementedError(f"{type(self).__name__} must define finish(cache, model, token_ids)")

    def choose_together(self, cache: Any) -> None:
        """Compress ``cache``, which stores all of the prefill, by what :meth:`compress` had its pairs carry.

        For ``chooses_together`` presses, whose :meth:`compress` keeps everything, with a number for each pair
        (``Kept.carry``); ``layer.carried()`` gives these back, and ``layer.keep(slots)`` evicts.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose_together(cache)")

    @property
    def chooses_again(self) -> bool:
        """Whether it can compress a prompt piece by piece: it chooses among what is left of a text that goes on."""
        return False

    # -- a press that watches attention, or has queries read a part of what is stored -------------------------------

    def observe(self, view: LayerView) -> Mapping[str, Tensor]:
        """New values of :attr:`columns` after an attention call, by name: ``[B, Hkv, T, ...]``; others are unchanged.

        Asked of every press, in whatever wrapper or schedule it is, after each attention call. A crop forgets tokens,
        and not what they gave to others.

        Args:
            view: all that is stored, ``view.columns`` among it, with the fill of each for new tokens; its queries are
                those of the call.
        """
        return {}

    def pins(self, view: LayerView) -> Tensor | None:
        """Tokens of ``view`` that nothing may evict, beside those of ``pin=``: bool ``[B, Hkv, T]``; None for none.

        Asked of every press, in whatever wrapper or schedule it is, whenever pairs are chosen.
        """
        return None

    def renew(self, view: LayerView) -> Mapping[str, Tensor]:
        """New values of :attr:`columns` for what is kept of ``view``, by name: ``[B, Hkv, T, ...]``; others unchanged.

        Asked whenever pairs are evicted, in whatever wrapper or schedule it is: for what changes from one eviction to
        the next, and not in every call.

        Args:
            view: what the press has chosen from, with the columns and queries that it chose by.
        """
        return {}

    def select(self, view: LayerView) -> Tensor | None:
        """Which slots of ``view`` a decoding query reads: int64 ``[B, Hkv, n]``, -1 for none; None for all."""
        return None

    # -- a press that goes on while decoding (see DecodingPress) ---------------------------------------------------

    @property
    def n_recent_queries(self) -> int:
        """How many of the newest tokens' queries a layer remembers for :meth:`compress_again`; 0: never called."""
        return 0

    def is_due(self, n_new: int) -> bool:
        """Whether a row that has got ``n_new`` tokens since it was last compressed is compressed now."""
        return False

    def compress_again(self, view: LayerView) -> Kept | None:
        """What is kept of ``view``, which has what is left of the text so far; None keeps all of it."""
        raise NotImplementedError(f"{type(self).__name__} must define compress_again(view)")

    # -- a press that judges tokens as they come, and evicts them later (see DMSPress) -----------------------------

    @property
    def n_waiting(self) -> int:
        """How many of the newest tokens are kept whatever :meth:`judge` has said of them; 0: it is never called."""
        return 0

    @property
    def judges_prompt(self) -> bool:
        """Whether the tokens of the prefill are judged too; then :meth:`compress` is not called."""
        return False

    def judge(self, view: LayerView) -> Tensor:
        """Which tokens of ``view``, those of this call, are kept when they are no longer new: bool ``[B, Hkv, n]``.

        The view has all rows of the batch, with their padding; entries of padding are ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} must define judge(view)")

    @property
    def evicts_while_decoding(self) -> bool:
        """Whether it compresses what comes after the prefill too."""
        return bool(self.n_recent_queries or self.n_waiting)

    if not TYPE_CHECKING:  # else any name at all would be an attribute to a type checker

        def __getattr__(self, name: str) -> Any:
            own = type(self).__name__
            raise AttributeError(not_called(own, name) or f"{own!r} object has no attribute {name!r}")


def parts(press: Press) -> Iterator[Press]:
    """The press and all presses inside it."""
    yield press
    for value in vars(press).values():
        for inner in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(inner, Press):
                yield from parts(inner)
