"""``with press(model):`` compress every cache that a model prefills inside the block."""

from __future__ import annotations

import inspect
import threading
import traceback
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel

from coldpress.architecture.cache_argument import argument_name, given_cache
from coldpress.architecture.wrapped import transformers_model
from coldpress.cache.layer import PressedLayer, next_layer
from coldpress.cache.pressed import PressedCache
from coldpress.cache.session import THREAD, Session
from coldpress.core.press import parts
from coldpress.core.requirements import (
    check_chunks,
    check_quantisable,
    require_block,
    require_rerotatable,
    require_text,
)
from coldpress.errors import CacheError, PressError
from coldpress.models.backend import WATCHERS
from coldpress.models.finishing import finish
from coldpress.models.scope import Scope
from coldpress.models.supported import use_coldpress

if TYPE_CHECKING:
    from coldpress.core.press import Press

__all__ = ["is_inside", "prefilling", "pressed"]

_OPEN: list[_Block] = []


@contextmanager
def pressed(model: nn.Module, press: Press) -> Iterator[None]:
    """Compress with ``press`` each cache whose prefill happens inside the block.

    The cache may be a :class:`PressedCache`, a DynamicCache (which then holds compressed layers), or none: the model
    gets one, as ``generate`` and ``use_cache=True`` expect. After the block the cache goes on being used as any other,
    and the model stays on coldpress's attention backend, which without a press computes what the model computed before;
    no hook and no attribute is left behind, whether the block ended normally or not.

    The block holds for the thread that opens it and for threads that are started while it is open, so a thread that
    streams is inside; it has to end before the block does. Other threads are left alone, and may open blocks of their
    own for the same model.

    Args:
        model: a transformers model, or a wrapper that runs one: of PEFT, DistributedDataParallel.
        press: what compresses.

    Raises:
        ModelError: the model cannot run on coldpress's backend.
        PressError: this model is inside another press's block, or the press lacks what it needs of it; or, when the
            block ends, the model has run in it and nothing was compressed. (A block in which no model runs is none.)
        CacheError: a cache of another kind, or one that has or had a different press.
    """
    model = transformers_model(model)
    use_coldpress(model)
    if any(block.model is model and block.scope.is_owner for block in _OPEN):
        raise PressError("This model is inside another press's block; one press at a time.")
    press = press.prepared(model)
    bound: list[Session] = []
    block = _Block(model)
    prefill = _Prefill(model, [], _looks_inside(press), raises=True)

    # torch adds a hook, then notes that it takes keywords: in between, another thread calls it without any
    def before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> tuple[Any, Any] | None:
        if kwargs is None or prefill.here.is_finishing or not block.holds():
            return None
        signature = inspect.signature(module.forward)
        call = signature.bind_partial(*args, **kwargs)
        given = dict(call.arguments)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        cache, use_cache = given_cache(given), given.get("use_cache")
        prefill.here.caches = ()  # those of this call alone, so that the block refers to no other
        if cache is not None:
            prefill.here.caches = (_bind(cache, press, bound),)
            block.sessions.add(prefill.here.caches[0].session)
            return None
        if use_cache is False or (use_cache is None and not getattr(module.config, "use_cache", True)):
            return None
        cache = PressedCache(press)
        bound.append(cache.session)
        block.sessions.add(cache.session)
        prefill.here.caches = (cache,)
        name = argument_name(module.forward)
        if name not in signature.parameters:
            return args, {**kwargs, name: cache}
        call.arguments[name] = cache
        return call.args, call.kwargs

    def after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        block.watch(module)

    modules = {id(m): m for m in (model, getattr(model, "base_model", None)) if isinstance(m, nn.Module)}
    with ExitStack() as stack:
        _OPEN.append(block)
        stack.callback(_OPEN.remove, block)
        WATCHERS.append(block.watch)
        stack.callback(WATCHERS.remove, block.watch)
        for module in modules.values():
            stack.callback(module.register_forward_pre_hook(before_forward, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after_forward).remove)
        stack.enter_context(prefill)
        stack.callback(_release, bound)
        yield
        block.check_done(press, prefill.busy)


def is_inside(model: nn.Module) -> bool:
    """Whether ``model`` is inside a press's block in this thread."""
    inner = transformers_model(model)
    return any(block.model is inner and block.holds() for block in _OPEN)


class _Block:
    """The block of one press and one model: which threads are in it, and whether anything came of it."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.scope = model, Scope()
        self.sessions: set[Session] = set()  # of the caches that were given
        self.has_run = False  # the model was called, or one of its layers attended
        self._modules = weakref.WeakSet(model.modules())

    def holds(self) -> bool:
        """Whether the current thread is in this block, and not in one of its own for the same model.

        Raises:
            PressError: it may be in this one or in another.
        """
        if not self.scope.holds():
            return False
        others = [b for b in _OPEN if b is not self and b.model is self.model and b.scope.holds()]
        if self.scope.is_owner or not others:
            return True
        if any(block.scope.is_owner for block in others):
            return False
        raise PressError(
            "This thread was started while several blocks with presses were open for this model, and may belong to any "
            "of them. Open the block inside the thread that runs the model."
        )

    def watch(self, module: nn.Module) -> None:
        """Note that ``module`` has run, or attends without a pressed cache, with or without the model's forward."""
        if not self.has_run and module in self._modules and self.holds():
            self.has_run = True

    def check_done(self, press: Press, busy: set[int]) -> None:
        """Raise unless the press was asked, if there was anything to compress, and every thread is done with it."""
        name = type(self.model).__name__
        if busy - {threading.get_ident()}:
            raise PressError(
                f"A thread is still reading its prompt with {name} while the block of {press!r} ends; join() it inside "
                "the block."
            )
        if not self.has_run:
            if any(thread.is_alive() for thread in self.scope.started()):
                warnings.warn(
                    f"The block of {press!r} ends before the thread that was started in it has called {name}; join() "
                    "the thread inside the block.",
                    stacklevel=4,
                )
            return
        for session in self.sessions:
            if session.error is None:  # else it has been raised
                session.check_claimed()
        if not any(session.was_asked or session.error for session in self.sessions):
            raise PressError(
                f"{name} ran inside this block and {press!r} compressed nothing: no call had a cache "
                "(use_cache=False), none went through the model that the block was given, or it has no attention "
                "layers that are compressed. Give the block the model that is called, and call it with a cache."
            )


def prefilling(model: PreTrainedModel, *caches: PressedCache) -> AbstractContextManager[Any]:
    """A block in which the presses of empty ``caches`` are shown what they need of ``model`` beside keys and values.

    For several caches that one prefill fills, the one that it is called with among them; ``with press(model):`` does
    the same for one press. A press that cannot be prepared or fails in :meth:`Press.finish` breaks its own cache,
    which raises the error at its next use.
    """
    for cache in caches:
        if cache.press is not None:
            try:
                cache.session.press = cache.press.prepared(model)
            except Exception as error:
                cache.session.error = error
    looks_inside = any(_looks_inside(cache.press) for cache in caches if cache.press is not None)
    return _Prefill(model, list(caches), looks_inside, raises=False)


def _finishes(press: Press) -> bool:
    """Whether a press chooses when the prefill is over, and so from pairs that are not in few bits yet."""
    return press.needs_model or press.chooses_together


def _looks_inside(press: Press) -> bool:
    return any(part.needs_hidden_states for part in parts(press))


class _Here(threading.local):
    """The state of one thread inside a block."""

    caches: tuple[PressedCache, ...] = ()  # that the call of the model fills
    under_way: list[PressedCache] = []  # noqa: RUF012 (never changed in place): those of them that were empty
    ids: Tensor | None = None  # int64 [B, Q] of the call
    is_finishing = False  # a press runs the model again


class _Prefill:
    """Shows presses the token ids and hidden states of a prefill, and lets them finish after it.

    Args:
        model: runs the prefill.
        caches: that it fills when this thread calls it; ``here.caches`` is set anew for other calls.
        needs_hidden_states: of any of their presses.
        raises: whether what goes wrong in finishing is raised at once too.
    """

    def __init__(self, model: PreTrainedModel, caches: list[PressedCache], needs_hidden_states: bool, raises: bool):
        base = getattr(model, "base_model", None)
        self.backbone: nn.Module = base if isinstance(base, nn.Module) else model
        decoder = getattr(self.backbone, "decoder", None)
        if isinstance(decoder, nn.Module):  # OPT's head calls what is inside the base
            self.backbone = decoder
        self.needs_hidden_states, self.raises = needs_hidden_states, raises
        self.here = _Here()
        self.here.caches = tuple(caches)
        self.busy: set[int] = set()  # threads that read a prompt just now
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            stack.callback(self.backbone.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(self.backbone.register_forward_hook(self._after).remove)
            stack.callback(self.backbone.register_forward_hook(self._leave, always_call=True).remove)
            for module in self.backbone.modules() if self.needs_hidden_states else ():
                if hasattr(module, "layer_idx"):  # transformers' attention layers know theirs
                    stack.callback(module.register_forward_pre_hook(self._show, with_kwargs=True).remove)
            self.stack = stack.pop_all()

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        THREAD.hidden_states = None
        self._begin([], None)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if not self.here.caches or self.here.is_finishing:
            return
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        for cache in self.here.caches:
            cache.session.find_model = weakref.ref(module)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        self.here.ids = ids
        self._begin([cache for cache in self.here.caches if not cache.seen_tokens], ids)
        if self.here.under_way:
            self.busy.add(threading.get_ident())
        for cache in self.here.under_way:
            if cache.press is None or not cache.press.needs_model or cache.session.error is not None:
                continue
            try:
                require_block(cache.press, ids)
                assert ids is not None
                has_padding = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
                cache.press.check_prefill(ids, has_padding)
                require_text(cache.press, given | given.pop("kwargs", {}))
            except PressError as error:
                if self.raises:
                    raise
                cache.session.error = error

    def _begin(self, caches: list[PressedCache], ids: Tensor | None) -> None:
        """Fill ``caches`` from ``ids`` from now on, and those of an earlier call no longer, even if it failed."""
        for cache in self.here.under_way:
            cache.session.token_ids, cache.session.is_to_finish = None, False
        self.here.under_way = caches
        for cache in caches:
            cache.session.token_ids = ids
            cache.session.is_to_finish = cache.press is not None and _finishes(cache.press)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.here.is_finishing:
            return
        if self.here.ids is not None:
            for cache in self.here.caches:
                cache.remember(self.here.ids)
        done = [(cache, cache.session.token_ids) for cache in self.here.under_way]
        self._begin([], None)
        for cache, ids in done:
            press = cache.press
            if press is None or not _finishes(press) or cache.session.error is not None:
                continue
            self.here.is_finishing = True
            try:
                with torch.no_grad():
                    finish(press, cache, self.backbone, ids)
            except Exception as error:
                cache.session.error = error
                if self.raises:
                    raise
                traceback.clear_frames(error.__traceback__)  # their tensors fill memory that the others need
            finally:
                self.here.is_finishing = False
                THREAD.hidden_states = None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.here.is_finishing:
            self.busy.discard(threading.get_ident())

    def _show(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        if not self.here.caches:
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            THREAD.hidden_states = module, hidden


def _release(sessions: list[Session]) -> None:
    for session in sessions:
        session.press, session.earlier_press = None, session.press


def _bind(cache: Any, press: Press, bound: list[Session]) -> PressedCache:
    """Let ``press`` compress ``cache``, whose type decides how; return it as a PressedCache."""
    layers = getattr(cache, "layers", [])
    session = next((layer.session for layer in layers if isinstance(layer, PressedLayer)), None)
    if isinstance(cache, PressedCache):
        session = cache.session
    if session is None:
        session = _adopt(cache)
    if session.rerotates:
        require_rerotatable(press)
    check_quantisable(press, session.storage, session.rerotates, session.chunk_tokens)
    if session.press is None:
        is_filled = any(isinstance(layer, PressedLayer) and layer.is_initialized for layer in layers)
        if is_filled and not press.evicts_while_decoding and session.earlier_press != press:
            earlier = session.earlier_press
            raise CacheError(
                "This cache holds tokens already; a press compresses during the prefill. Start empty."
                if earlier is None
                else f"This cache was compressed by {earlier!r}, and a press compresses the first prompt alone; later "
                "turns are stored whole. Go on without a press or with the same one, or start with an empty cache."
            )
        check_chunks(press, session.chunk_tokens)
        session.press = press
        bound.append(session)
    elif session.press != press:
        raise CacheError(f"This cache has a press of its own, {session.press!r}; give it a cache without one.")
    else:
        session.press = press  # equal, and prepared
    return cache if isinstance(cache, PressedCache) else PressedCache.around(session, cache.layers)


def _adopt(cache: Any) -> Session:
    """Replace the layers of a DynamicCache with keys and values by layers that can be compressed."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        what = "one that is offloaded to the CPU" if type(cache) is DynamicCache else type(cache).__name__
        raise CacheError(
            f"A press compresses a PressedCache or a plain DynamicCache, not {what}. Leave cache_implementation out, "
            "or pass a coldpress.PressedCache(); for one that is quantised, PressedCache(kv_bits=4)."
        )
    if isinstance(cache, Cache) and cache.get_seq_length() > 0:
        raise CacheError("This DynamicCache holds tokens already; a press compresses during the prefill. Start empty.")
    if any(hasattr(layer, "get_mask_sizes") and hasattr(layer, "conv_states") for layer in cache.layers):
        raise CacheError("Layers that keep a state beside their keys and values are not supported.")
    session = Session()
    cache.layer_class_to_replicate = partial(next_layer, session)
    layers = [next_layer(session) for _ in cache.layers]
    cache.layers = [
        ours if hasattr(theirs, "get_mask_sizes") else theirs for ours, theirs in zip(layers, cache.layers, strict=True)
    ] or [next_layer(session)]
    return session
