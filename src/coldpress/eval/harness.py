"""The model ``coldpress`` of lm-evaluation-harness: contexts are compressed, then continuations are scored or written.

A teacher-forced forward under a press measures nothing (compression comes after attention), so every request is taken
apart: the context but for its last token is prefilled into a PressedCache, the press evicts, and the last token and the
continuation are fed behind what is left, at their original positions. The last token is held back because the
prediction of the first token of the continuation is made where it is fed: in the prefill, every pair would be seen.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from coldpress.architecture.cache_argument import cache_argument
from coldpress.bases.press import BasePress
from coldpress.cache.pressed import PressedCache
from coldpress.core.requirements import check_chunks, check_quantisable
from coldpress.errors import InputError, MissingDependencyError, PressError, SelfCheckError
from coldpress.eval.jobs import integer, is_whole
from coldpress.eval.losses import left_padded, predictions
from coldpress.eval.point_run import check_stored_pairs
from coldpress.io.files import path_of
from coldpress.io.network import one_line
from coldpress.loading.models import packaged
from coldpress.loading.presses import press_of, read_press_args
from coldpress.models.block import prefilling
from coldpress.models.prompts import prefill
from coldpress.models.supported import use_coldpress
from coldpress.stores.bits import storage_of
from coldpress.stores.codec import Codec

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError(
        f'The model for lm-evaluation-harness needs packages that are not installed ({one_line(error)}): pip install "'
        'coldpress[lm-eval]".'
    ) from error


LOG = logging.getLogger(__name__)
PROOF_CONTEXTS = 16  # compressed contexts that may score as uncompressed ones do before a run is given up

_Context = tuple[int, ...]


@register_model("coldpress")
class ColdpressLM(HFLM):
    """``lm_eval``'s model ``hf`` with contexts that a press compresses; see docs/guide/lm-eval.md.

    Without a press and bits its log-likelihoods are those of ``hf``.

    Args:
        pretrained: hub id, local folder, ``.gguf`` file, ``demo``, ``smollm2``, or a model.
        press: name of a press (``coldpress presses``), or a press; None or ``no_press`` for none.
        compression_ratio: fraction of the pairs to remove, in [0, 1); 0.5 where nothing says how much.
        budget_tokens, budget_bytes: instead of a ratio, as in :class:`coldpress.ScorerPress`.
        press_args: other parameters of a named press: a dictionary, or JSON.
        chunk_tokens: contexts are read in pieces of so many tokens, and compressed after each.
        kv_bits: 8, 4, 2, or a name such as ``"k8v4"``: what is kept is stored in so few bits.
        min_context_tokens: contexts of which the press would get fewer tokens stay as they are; a warning says how
            many these were, and the results hold it.
        device: cuda where there is one, else cpu.
        dtype: default: float32 on the CPU, elsewhere the checkpoint's.
        batch_size: contexts that are prefilled together, and continuations that are scored together.
        attn_implementation: the arithmetic underneath: sdpa, eager or flash_attention_2.
        gguf_file: of the folder ``pretrained``.
        options: of lm_eval's ``hf``: revision, tokenizer, max_length, add_bos_token, parallelize, peft, ...

    Raises:
        InputError: what is given cannot work; a press that is unknown, bits that it cannot be stored in, ...
        SelfCheckError: from the methods that measure, when something was to be removed and nothing was.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        press: str | BasePress | None = None,
        compression_ratio: float | None = None,
        budget_tokens: int | None = None,
        budget_bytes: int | None = None,
        press_args: dict[str, Any] | str | None = None,
        chunk_tokens: int | None = None,
        kv_bits: int | str | Codec | None = None,
        min_context_tokens: int = 1,
        device: str | None = None,
        dtype: Any = None,
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        gguf_file: str | None = None,
        **options: Any,
    ):
        budgets = {"budget_tokens": budget_tokens, "budget_bytes": budget_bytes}
        self.press = press_of(press, compression_ratio, budgets, read_press_args(press_args))
        self.kv_bits, self.chunk_tokens = storage_of(kv_bits), chunk_tokens
        self.min_context_tokens = max(1, integer("min_context_tokens", min_context_tokens, 0))
        check_chunks(self.press, chunk_tokens)
        check_quantisable(self.press, self.kv_bits)
        batch_size = integer("batch_size", batch_size, 1)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if dtype is None:
            dtype = "float32" if str(device) == "cpu" or not torch.cuda.is_available() else "auto"
        with ExitStack() as stack:
            source = packaged(pretrained, stack)
            if isinstance(source, str) and source.endswith(".gguf"):
                weights = path_of(source)
                source, gguf_file = str(weights.parent), weights.name
            super().__init__(source, device=device, dtype=dtype, batch_size=batch_size, gguf_file=gguf_file, **options)
        use_coldpress(self.model, attn_implementation)
        self.asked = {
            "press": repr(self.press),
            "kv_bits": repr(self.kv_bits),
            "chunk_tokens": chunk_tokens,
            "min_context_tokens": self.min_context_tokens,
            "pretrained": pretrained if isinstance(pretrained, str) else self.model.name_or_path,
        }
        if self.press is not None:
            self.press = self.press.prepared(self.model, self.tokenizer)
        self.contexts = self.left_whole = 0  # measured so far; of them, those that are too short
        self.context_tokens = 0
        self.removed_tokens = 0.0
        self._proof: int | None = 0  # compressed contexts without any effect so far; None: there was one

    @property
    def compresses(self) -> bool:
        """Whether anything is asked to become smaller."""
        return self.kv_bits is not None or not is_whole(self.press)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes beside its results: what was asked for, and how much was removed."""
        ratio = self.removed_tokens / self.context_tokens if self.context_tokens else 0.0
        measured = {
            "contexts": self.contexts,
            "contexts_left_whole": self.left_whole,
            "context_tokens": self.context_tokens,
            "achieved_ratio": ratio,
        }
        return {**super().get_model_info(), "coldpress": {**self.asked, **measured}}

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Answers that ``--use_cache`` has stored belong to a press; InputError where they are those of another one."""
        super().set_cache_hook(cache_hook)
        store = cache_hook.dbdict
        if store is not None:
            mine = json.dumps(self.asked, sort_keys=True)
            if len(store) and store.get("coldpress") != mine:
                raise InputError(
                    "--use_cache names a file with answers of another press or model, and lm_eval would take them for "
                    "this one's; give every setting a file of its own."
                )
            store["coldpress"] = mine

    # -- log-likelihoods ------------------------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token scored once.

        Without a press these are lm_eval's own: windows of ``max_length`` tokens that see one token before them. With
        one, of whatever ratio, a text is cut into blocks of half of ``max_length``, and each is scored against the
        compressed block before it, the first one against the prefix token alone. The baseline of such a number is the
        same press at ratio 0.
        """
        if self.press is None and self.kv_bits is None:
            totals: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
            return totals
        half = max(1, self.max_length // 2)
        parts: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for start in range(0, len(ids), half):
                before = ids[start - half : start] if start else [self.prefix_token_id]
                parts.append((None, before, ids[start : start + half]))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(parts, disable_tqdm), strict=True):
            sums[i] += total
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether it is what greedy decoding would write.

        Continuations of one context share its prefill, and do not see each other. A request is what the answer is
        stored under, the tokens of a context, and those of a continuation.
        """
        jobs: dict[_Context, list[tuple[int, _Context]]] = {}
        n_cut = 0
        for i, (_, before, wanted) in enumerate(requests):
            if not 0 < len(wanted) <= self.max_length:
                raise InputError(
                    f"A continuation has {len(wanted)} tokens; it must have at least 1 and at most max_length="
                    f"{self.max_length}."
                )
            ids = (before + wanted)[-(self.max_length + 1) :]  # as many as the model is fed, and one more to predict
            n_cut += len(ids) < len(before) + len(wanted)
            jobs.setdefault(tuple(ids[: -len(wanted)]), []).append((i, tuple(wanted)))
        if n_cut:
            LOG.warning(
                "The contexts of %d of %d requests are cut on the left to fit into max_length.", n_cut, len(requests)
            )
        answers: dict[int, tuple[float, bool]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for contexts, is_pressed in self._batches(jobs):
            for i, answer in self._score(contexts, jobs, is_pressed):
                answers[i] = answer
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(1)
        bar.close()
        self._report()
        return [answers[i] for i in range(len(requests))]

    def _batches(self, contexts: Iterable[_Context]) -> Iterator[tuple[list[_Context], bool]]:
        """Contexts that are run together, the longest first, and whether they are compressed."""
        kinds: dict[tuple[bool, bool], list[_Context]] = {}
        for context in sorted(contexts, key=lambda context: (-len(context), context)):
            kinds.setdefault((self._is_pressed(len(context)), len(context) > 1), []).append(context)
        for (is_pressed, _), alike in kinds.items():
            while alike:
                n = self._rows(is_pressed)
                yield alike[:n], is_pressed
                alike = alike[n:]

    def _is_pressed(self, n_tokens: int) -> bool:
        """Whether a context of so many tokens is compressed; the last one is held back."""
        return (self.press is not None or self.kv_bits is not None) and n_tokens - 1 >= self.min_context_tokens

    def _rows(self, is_pressed: bool) -> int:
        """How many contexts are prefilled together: some presses take one text at a time.

        Until compression has had an effect it is one too: bit for bit the same are only scores without padding.
        """
        if is_pressed and self._is_to_be_proved:
            return 1
        if is_pressed and self.press is not None:
            try:
                self.press.check_prefill(torch.empty(2, 1, dtype=torch.long), has_padding=True)
            except PressError:
                return 1
        return int(self.batch_size)

    def _score(
        self, contexts: list[_Context], jobs: dict[_Context, list[tuple[int, _Context]]], is_pressed: bool
    ) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The index of each request of ``contexts``, and its answer."""
        ids, mask = left_padded([context[:-1] for context in contexts], self.device)
        fed: dict[tuple[int, _Context], list[tuple[int, _Context]]] = {}
        for row, context in enumerate(contexts):
            for i, wanted in jobs[context]:
                fed.setdefault((row, (context[-1], *wanted[:-1])), []).append((i, wanted))
        with ExitStack() as stack:
            cache = self._prefilled(ids, mask, is_pressed, stack)
            self._count(contexts, cache, is_pressed)
            full = self._prefilled(ids, mask, False, stack) if is_pressed and self._is_to_be_proved else None
            for start in range(0, len(fed), int(self.batch_size)):
                keys = list(fed)[start : start + int(self.batch_size)]
                rows = torch.tensor([row for row, _ in keys], device=self.device)
                tokens = [tokens for _, tokens in keys]
                found = predictions(self.model, cache, mask, rows, tokens)
                if full is not None and found != predictions(self.model, full, mask, rows, tokens):
                    self._proof = None
                for key, prediction in zip(keys, found, strict=True):
                    for i, wanted in fed[key]:
                        yield i, prediction.of(wanted[-1])
            if full is not None and self._proof is not None:
                self._proof += len(contexts)
                if self._proof >= PROOF_CONTEXTS:
                    self._refuse()

    def _prefilled(self, ids: Tensor, mask: Tensor | None, is_pressed: bool, stack: ExitStack) -> PressedCache:
        """The cache of ``ids [B, C]``; a press that goes on while decoding is shown the rest until ``stack`` closes."""
        press, kv_bits = (self.press, self.kv_bits) if is_pressed else (None, None)
        if not ids.shape[1]:
            return PressedCache()
        cache = PressedCache(press, chunk_tokens=self.chunk_tokens, kv_bits=kv_bits)
        with ExitStack() as block:
            block.enter_context(prefilling(self.model, cache))
            model: Any = self.model
            backbone = getattr(model, model.base_model_prefix, model)  # logits are not needed
            prefill(backbone, ids, cache, mask)
            cache.get_seq_length()  # raises what the press raised
            if press is not None and press.evicts_while_decoding:
                stack.push(block.pop_all())
        if mask is None:
            check_stored_pairs(press, cache, ids.shape[1])
        return cache

    # -- texts ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each compressed context."""
        texts: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        self._report(is_proved=False)
        return texts

    @torch.inference_mode()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Contexts ``[B, T]``, padded on the left, with what is written after each."""
        mask = options.pop("attention_mask", None)
        mask = torch.ones_like(context) if mask is None else mask
        kinds: dict[bool, list[int]] = {}
        for row, length in enumerate(mask.sum(-1).tolist()):
            kinds.setdefault(self._is_pressed(length), []).append(row)
        written: dict[int, Tensor] = {}
        for is_pressed, alike in kinds.items():
            while alike:
                n = self._rows(is_pressed)
                rows, alike = alike[:n], alike[n:]
                begin = int((mask[rows].sum(0) == 0).sum())  # columns that are padding in all of these rows
                ids, own = context[rows, begin:], mask[rows, begin:]
                texts = [tuple(row[seen.bool()].tolist()) for row, seen in zip(ids, own, strict=True)]
                with ExitStack() as stack:
                    held_back = own[:, :-1] if not own.all() else None
                    cache = self._prefilled(ids[:, :-1], held_back, is_pressed, stack)
                    self._count(texts, cache, is_pressed)
                    cache.batch_repeat_interleave(options.get("num_beams") or 1)
                    output = super()._model_generate(
                        ids, max_length - begin, stop, attention_mask=own, **cache_argument(cache), **options
                    )
                written |= dict(zip(rows, output[:, ids.shape[1] :], strict=True))
        width = max(len(tokens) for tokens in written.values())
        rest = context.new_full((len(context), width), self.tokenizer.pad_token_id)
        for row, tokens in written.items():
            rest[row, : len(tokens)] = tokens
        return torch.cat([context, rest], 1)

    # -- what was done ----------------------------------------------------------------------------------------------

    @property
    def _is_to_be_proved(self) -> bool:
        return self.compresses and self._proof is not None

    def _count(self, contexts: Sequence[_Context], cache: PressedCache, is_pressed: bool) -> None:
        n_tokens = sum(len(context) - 1 for context in contexts)
        self.contexts += len(contexts)
        self.left_whole += 0 if is_pressed else len(contexts)
        self.context_tokens += n_tokens
        self.removed_tokens += cache.achieved_ratio() * n_tokens

    def _report(self, is_proved: bool = True) -> None:
        """Say how many contexts were left as they are; refuse if nothing was removed and something should have been."""
        if not self.compresses or not self.contexts:
            return
        if self.left_whole or (not self.removed_tokens and self.kv_bits is None):
            LOG.warning(
                "%d of %d contexts were left uncompressed (fewer than min_context_tokens=%d tokens for the press). Of "
                "the tokens of all contexts %.1f %% were removed.",
                *(self.left_whole, self.contexts, self.min_context_tokens),
                100 * self.removed_tokens / self.context_tokens if self.context_tokens else 0.0,
            )
        if self.left_whole == self.contexts or (is_proved and self._proof is not None):
            self._refuse()

    def _refuse(self) -> None:
        if self.left_whole == self.contexts:
            why = f"none of the {self.contexts} contexts has min_context_tokens={self.min_context_tokens}"
        else:
            why = "all scores are bit for bit those of the uncompressed contexts"
        raise SelfCheckError(f"{self.press}, kv_bits={self.kv_bits}: nothing was compressed, {why}.")
