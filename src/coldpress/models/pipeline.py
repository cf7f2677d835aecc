"""The pipeline "kv-press-text-generation": compress a context once, then ask it any number of questions.

The task is known to transformers under kvpress's name and, since two packages with one task name overwrite each other,
under ``coldpress-text-generation`` too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from coldpress.architecture.cache_argument import cache_argument
from coldpress.architecture.generating import switching_point
from coldpress.architecture.rope import stand_at
from coldpress.cache.pins import Pins, checked_pins
from coldpress.cache.pressed import PressedCache
from coldpress.core.press import Press
from coldpress.errors import CacheError, InputError
from coldpress.models.block import prefilling, pressed
from coldpress.models.chat import prompt_parts
from coldpress.models.pipeline_options import OWN, check_config, check_options
from coldpress.models.prompts import prefill
from coldpress.models.supported import use_coldpress
from coldpress.stores.bits import storage_of
from coldpress.stores.codec import Codec

__all__ = ["TASKS", "KVPressTextGenerationPipeline", "register"]

TASKS = ("kv-press-text-generation", "coldpress-text-generation")
# options that read the tokens before an answer, and what switches each of them off beside None and 0
_READING = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "sequence_bias": [],
    "watermarking_config": None,
    "logits_processor": [],
    "stopping_criteria": [],
    "prefix_allowed_tokens_fn": None,
}


def register() -> None:
    """Register the task with ``transformers.pipeline``."""
    for task in TASKS:
        PIPELINE_REGISTRY.register_pipeline(
            task, KVPressTextGenerationPipeline, pt_model=AutoModelForCausalLM, type="text"
        )


class KVPressTextGenerationPipeline(Pipeline):
    """Compress a context, then generate an answer to each question about it.

    ::

        pipe = pipeline("kv-press-text-generation", model="EleutherAI/pythia-70m", device_map="auto")
        pipe(context, question="Who?", press=SnapKVPress(0.5))["answer"]
        pipe(context, questions=["Who?", "When?"], press=SnapKVPress(0.5))["answers"]

    Only the context is compressed, unless the press goes on while decoding; a question sees what is left of it and
    never another question or its answer. With a chat template the context is the user's turn up to the question,
    without one it is taken as it is, after the tokenizer's beginning-of-text token if it has one.

    A context that was compressed earlier, or loaded from a file, is asked without its text::

        pipe(question="Who?", cache=PressedCache.load("context.safetensors", pipe.model))["answer"]

    Args (of a call; those of the constructor apply to every call):
        context: a text, or a list of texts that are answered one after the other; left out, or None, where the cache
            stores the context already.
        question, questions: one question or several; none asks the model to go on with the context.
        answer_prefix: put before each answer, and not part of what is returned.
        press: what compresses the context; None keeps it whole. One that goes on while decoding (DecodingPress, or
            DMSPress with decoding=True) compresses questions and answers too, each on a branch of its own.
        max_new_tokens: of each answer (default: that of generation_config, or 50).
        max_context_length: the context's tokens after this many are cut off, with a warning; default: the tokenizer's
            or the model's maximum, less room for the longest question and answer.
        enable_thinking: handed to the chat template.
        cache: a PressedCache, empty or with a compressed context of an earlier call (then ``context`` goes on from
            there); after the call it stores the context and no answer. One with ``chunk_tokens`` reads the context in
            pieces, and compresses after each.
        pin: spans of the context's own tokens that nothing may evict, such as ``[(0, 40)]``: what a template, a
            beginning-of-text token or a system prompt puts before them is not counted, as it is in
            ``PressedCache(pin=...)``.
        pin_system: a system prompt, put before the context and pinned: the system's turn of a chat template, or a
            paragraph of its own. An empty ``cache`` gets the pin; one with a context is past its beginning.
        kv_bits: 8, 4, 2, a name such as ``"k8v4"``, or a KVBits or RotatedBits: store what is kept of the context, and
            what is answered, in so few bits. It takes the place of kvpress's cache=QuantizedCache(...); with cache=,
            give it to that PressedCache instead.
        streamer and any option of ``generate``: passed on to it; decoding is greedy unless they say otherwise. Unknown
            options, and those that a compressed context rules out, are refused.

    Returns:
        ``{"answer": str}``, or ``{"answers": list[str]}`` for ``questions``; a list of them for a list of contexts.

    Raises:
        InputError: an unknown option, an empty context, both question and questions, no room for a context, a chat
            template without a system's turn.
    """

    _load_processor = _load_image_processor = _load_feature_extractor = False
    _load_tokenizer = True
    _given: dict[str, Any] | None = None  # the constructor's options

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if self._given is None:  # the constructor calls first
            self._given = kwargs
        kwargs = {**self._given, **kwargs}
        check_options(kwargs)
        question, questions, cache = kwargs.get("question"), kwargs.get("questions"), kwargs.get("cache")
        config = kwargs.get("generation_config")
        max_new_tokens = kwargs.get("max_new_tokens") or getattr(config, "max_new_tokens", None) or 50
        preprocess = {
            "questions": [question or ""] if questions is None else list(questions),
            "answer_prefix": kwargs.get("answer_prefix") or "",
            "max_context_length": kwargs.get("max_context_length"),
            "max_new_tokens": max_new_tokens,
            "enable_thinking": kwargs.get("enable_thinking", False),
            "n_earlier": 0 if cache is None else cache.seen_tokens,
            "pin": checked_pins(kwargs.get("pin")),
            "pin_system": kwargs.get("pin_system"),
        }
        options = {k: v for k, v in kwargs.items() if k not in OWN}
        forward = {
            "press": kwargs.get("press"),
            "cache": cache,
            "kv_bits": storage_of(kwargs.get("kv_bits")),
            "options": {"max_new_tokens": max_new_tokens, **options},
        }
        return preprocess, forward, {"is_single": questions is None}

    def __call__(self, context: str | Sequence[str] | None = None, **kwargs: Any) -> Any:
        if context is None:
            cache = {**(self._given or {}), **kwargs}.get("cache")
            if isinstance(cache, PressedCache) and cache.seen_tokens:
                return super().__call__("", **kwargs)
        if isinstance(context, (list, tuple)):
            if kwargs.get("cache") is not None and len(context) > 1:
                raise CacheError("One cache holds one context: call the pipeline once for each context.")
            return [self(text, **kwargs) for text in context]
        if not isinstance(context, str) or not context:
            raise InputError(
                f"The context must be a text that is not empty, or a list of such texts; got {context!r}. It "
                "may be left out only with a cache= that holds one."
            )
        return super().__call__(context, **kwargs)

    def preprocess(
        self,
        context: str,
        questions: list[str],
        answer_prefix: str,
        max_context_length: int | None,
        max_new_tokens: int,
        enable_thinking: bool,
        n_earlier: int,
        pin: Pins = (),
        pin_system: str | None = None,
    ) -> dict[str, Any]:
        tokenizer: Any = self.tokenizer
        system, before, after = prompt_parts(tokenizer, context, pin_system, enable_thinking, is_first=not n_earlier)

        def encode(text: str) -> Tensor:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return torch.tensor([ids], dtype=torch.long)

        question_ids = [encode(question + after + answer_prefix) for question in questions]
        if any(ids.shape[1] == 0 for ids in question_ids):
            raise InputError("A question has no tokens; leave question= out to let the model go on with the context.")
        system_ids = encode(system)
        context_ids = torch.cat([system_ids, encode(before)], dim=1)
        ahead = encode(system + before.removesuffix(context))
        pins = [_in_prompt(span, encode(context)[0], context_ids[0], ahead[0]) for spans in pin for span in spans]
        limit, longest = max_context_length, max((ids.shape[1] for ids in question_ids), default=0)
        if limit is None:
            limit = self._max_positions() - n_earlier - longest - max_new_tokens
        elif n_earlier + min(limit, context_ids.shape[1]) + max_new_tokens > self._max_positions():
            warnings.warn(
                f"The context and its answer go past the {self._max_positions()} positions of the model.", stacklevel=2
            )
        if limit < (system_ids.shape[1] + 1 if context else 0):
            what = "a context" if context else f"a question and its answer after the {n_earlier} tokens of the cache"
            why = f"max_context_length is {limit}, and {system_ids.shape[1]} tokens are pinned"
            if max_context_length is None:
                needed = f"{longest + max_new_tokens} of the model's {self._max_positions()} positions"
                why = f"a question of {longest} tokens and max_new_tokens={max_new_tokens} need {needed}"
            raise InputError(f"There is no room for {what}: {why}.")
        self._check_switch(n_earlier + min(limit, context_ids.shape[1]), question_ids, max_new_tokens)
        if context_ids.shape[1] > limit:
            why = "(max_context_length)"
            if max_context_length is None:
                room = self._max_positions() - n_earlier - limit
                taken = f"{n_earlier:,} taken and " if n_earlier else ""
                why = (
                    f"({self._max_positions():,} positions of the model, {taken}{room:,} left free for a question and "
                    "its answer); give a shorter text, or a model with more positions"
                )
            message = f"The context is cut from {context_ids.shape[1]:,} to its first {limit:,} tokens {why}."
            warnings.warn(message, UserWarning, stacklevel=2)
        parts = {"context_ids": context_ids[:, :limit], "question_ids": question_ids}
        n_cut = max(0, context_ids.shape[1] - limit)
        return {**parts, "n_cut": n_cut, "pin": pins, "n_system": system_ids.shape[1]}

    def _forward(
        self,
        inputs: dict[str, Any],
        press: Press | None,
        cache: PressedCache | None,
        kv_bits: Codec | None,
        options: dict[str, Any],
    ) -> list[str]:
        use_coldpress(self.model)
        check_config(options.get("generation_config"), self.model.generation_config)
        context_ids = inputs["context_ids"].to(self.model.device)
        cache = PressedCache(press, kv_bits=kv_bits, pin=inputs["pin"]) if cache is None else cache
        earlier = cache.seen_tokens
        cache.session.cut_tokens += inputs["n_cut"]
        if inputs["n_system"]:
            (own,) = cache.session.pins or ((),)
            cache.session.pins = ((*own, (0, inputs["n_system"])),)
        block: AbstractContextManager[Any]
        is_done = earlier and (cache.press is None or not cache.press.evicts_while_decoding)
        if not is_done:  # else there is nothing that a press would need of the model
            press = None if press is None else press.prepared(self.model, self.tokenizer)
            if cache.press is not None:
                cache.session.press = cache.press.prepared(self.model, self.tokenizer)
        if press is not None and cache.press != press:
            if cache.press is not None or earlier:
                raise CacheError("The cache has another press or holds tokens; give an empty one, or no press.")
            block = pressed(self.model, press)
        else:
            press, block = cache.press, nullcontext() if is_done else prefilling(self.model, cache)
        questions = [ids.to(context_ids.device) for ids in inputs["question_ids"]]
        with ExitStack() as stack:
            stack.enter_context(block)
            if context_ids.shape[1]:
                self._prefill(context_ids, cache)
            if press is None or not press.evicts_while_decoding:  # else it is shown what is generated too
                stack.close()
            return [self._answer(ids, cache, options) for ids in questions]

    def _prefill(self, context_ids: Tensor, cache: PressedCache) -> None:
        """Run the backbone only: the vocabulary-sized logits of a long context need more memory than its cache."""
        backbone: Any = getattr(self.model, self.model.base_model_prefix, self.model)
        if cache.seen_tokens:
            stand_at(backbone, cache.seen_tokens)
            backbone(input_ids=context_ids, **cache_argument(cache, backbone), use_cache=True)
            cache.remember(context_ids)
        else:
            prefill(backbone, context_ids, cache)

    def _answer(self, question: Tensor, cache: PressedCache, options: dict[str, Any]) -> str:
        config = copy.deepcopy(options.get("generation_config") or self.model.generation_config)
        if "generation_config" not in options:
            options = {"do_sample": False, **options}
        options = config.update(
            **{k: v for k, v in options.items() if k != "generation_config"}
        )  # streamer and the like
        config.update(use_cache=True, cache_implementation=None, num_return_sequences=1)
        if config.pad_token_id is None and config.eos_token_id is not None:
            config.pad_token_id = (
                config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
            )
        if config.stop_strings is not None:
            options["tokenizer"] = self.tokenizer
        context = cache.token_ids
        if context is None:  # generate only needs to know that they are there
            for name, off in _READING.items():
                value = {**vars(config), **options}.get(name)
                if value and value != off:
                    raise InputError(
                        f"{name} reads the tokens of the context, which this cache does not know: a bare call of the "
                        "model has filled it, or an older version saved it. Fill it by coldpress.prefill() or this "
                        f"pipeline, or leave {name} out."
                    )
            context = question.new_zeros(1, cache.seen_tokens)
        ids = torch.cat([context, question], 1)
        branch = cache.fork()  # the answer grows on a branch, and the context is unchanged for the next question
        branch.batch_repeat_interleave(config.num_beams or 1)
        stand_at(self.model, cache.seen_tokens)  # an answer does not depend on questions before it
        output = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), **cache_argument(branch), generation_config=config, **options
        )
        output = getattr(output, "sequences", output)
        tokenizer: Any = self.tokenizer
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    def postprocess(self, answers: list[str], is_single: bool) -> dict[str, Any]:
        return {"answer": answers[0]} if is_single else {"answers": answers}

    def _check_switch(self, n_context: int, question_ids: list[Tensor], max_new_tokens: int) -> None:
        """Refuse an answer that may cross the point where the model drops its cache, before the context is read."""
        switch_at = switching_point(self.model.config.get_text_config(decoder=True))
        n_most = n_context + max((ids.shape[1] for ids in question_ids), default=0) + max_new_tokens
        if switch_at is not None and n_context <= switch_at < n_most:
            raise InputError(
                f"The model changes its rotary frequencies after {switch_at} tokens. A context of {n_context}, a "
                f"question and {max_new_tokens} new tokens go past that, and what is cached cannot; give a longer "
                "context, or a smaller max_new_tokens."
            )

    def _max_positions(self) -> int:
        text = self.model.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None) or 2**31
        return int(min(getattr(self.tokenizer, "model_max_length", positions), positions))


def _in_prompt(span: tuple[int, int], own: Tensor, prompt: Tensor, ahead: Tensor) -> tuple[int, int]:
    """Where a span of a context's tokens ``own`` lies in ``prompt``, which has ``ahead`` and then the context.

    The first tokens of a context may be others there, as they join with what is ahead; a span of these has them all.
    """
    n_other, shift = len(own) - _n_alike(own.flip(0), prompt.flip(0)), len(prompt) - len(own)
    start, stop = span
    return _n_alike(ahead, prompt) if start < n_other else start + shift, max(stop, n_other) + shift


def _n_alike(one: Tensor, other: Tensor) -> int:
    """With how many tokens both begin."""
    n = min(len(one), len(other))
    return int((one[:n] == other[:n]).long().cumprod(0).sum())


register()
