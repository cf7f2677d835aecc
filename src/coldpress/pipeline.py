"""The pipeline "kv-press-text-generation": compress a context once, then ask it any number of questions.

``register()`` adds the task to transformers when coldpress is imported, under kvpress's name and, since two packages
with one task name overwrite each other, under ``coldpress-text-generation`` too.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, Pipeline
from transformers.cache_utils import Cache
from transformers.pipelines import PIPELINE_REGISTRY

from coldpress.attention import use_coldpress
from coldpress.cache import PressedCache
from coldpress.errors import CacheError, InputError, PressError, nearest
from coldpress.presses.base import BasePress

__all__ = ["TASKS", "KVPressTextGenerationPipeline", "register"]

TASKS = ("kv-press-text-generation", "coldpress-text-generation")
_OWN = (
    "question",
    "questions",
    "answer_prefix",
    "press",
    "max_new_tokens",
    "max_context_length",
    "enable_thinking",
    "cache",
)
_PASSED_ON = ("streamer", "generation_config", "stopping_criteria", "logits_processor")


def register() -> None:
    """Make the task known to ``transformers.pipeline``."""
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

    Only the context is compressed; a question sees what is left of it and never another question or its answer. With a
    chat template the context is the user's turn up to the question, without one it is taken as it is, after the
    tokenizer's beginning-of-text token if it has one.

    Args (of a call):
        context: a text, or a list of texts that are answered one after the other.
        question, questions: one question or several; none asks the model to go on with the context.
        answer_prefix: put before each answer, and not part of what is returned.
        press: what compresses the context; None keeps it whole.
        max_new_tokens: of each answer (default 50).
        max_context_length: the context's tokens after this many are cut off, with a warning; default: the tokenizer's
            or the model's maximum, less room for the longest question and answer.
        enable_thinking: handed to the chat template.
        cache: a PressedCache, empty or holding a compressed context of an earlier call (then ``context`` goes on from
            there); after the call it holds the context and no answer.
        streamer and any option of ``generate``: passed on to it. Unknown options are refused.

    Returns:
        ``{"answer": str}``, or ``{"answers": list[str]}`` for ``questions``; a list of them for a list of contexts.

    Raises:
        InputError: an unknown option, an empty context, both question and questions.
    """

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        allowed = [*_OWN, *_PASSED_ON, *_generation_options()]
        for name in kwargs:
            if name not in allowed:
                raise InputError(f"Unknown option {name!r} of kv-press-text-generation.{nearest(name, allowed)}")
        question, questions, press = kwargs.get("question"), kwargs.get("questions"), kwargs.get("press")
        if question is not None and questions is not None:
            raise InputError("Give question or questions, not both.")
        if isinstance(questions, str):
            raise InputError("questions must be a list of texts; for a single one use question=.")
        if press is not None and not isinstance(press, BasePress):
            raise PressError(f"press must be a press such as coldpress.SnapKVPress(0.5), got {press!r}.")
        max_new_tokens = kwargs.get("max_new_tokens", 50)
        preprocess = {
            "questions": [question or ""] if questions is None else list(questions),
            "answer_prefix": kwargs.get("answer_prefix") or "",
            "max_context_length": kwargs.get("max_context_length"),
            "max_new_tokens": max_new_tokens,
            "enable_thinking": kwargs.get("enable_thinking", False),
        }
        options = {k: v for k, v in kwargs.items() if k not in _OWN}
        forward = {"press": press, "cache": kwargs.get("cache"), "max_new_tokens": max_new_tokens, "options": options}
        return preprocess, forward, {"is_single": questions is None}

    def __call__(self, context: str | Sequence[str], **kwargs: Any) -> Any:
        if not isinstance(context, str):
            if kwargs.get("cache") is not None and len(context) > 1:
                raise CacheError("One cache holds one context: call the pipeline once for each context.")
            return [self(text, **kwargs) for text in context]
        if not context:
            raise InputError("The context is empty; give the text that is to be compressed.")
        return super().__call__(context, **kwargs)

    def preprocess(
        self,
        context: str,
        questions: list[str],
        answer_prefix: str,
        max_context_length: int | None,
        max_new_tokens: int,
        enable_thinking: bool,
    ) -> dict[str, Any]:
        tokenizer = self.tokenizer
        if getattr(tokenizer, "chat_template", None) is None:
            before, after = (getattr(tokenizer, "bos_token", None) or "") + context, "\n"
        else:
            separator = "#" * (len(context) + 10)  # longer than any run of them in the context
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": context + separator}],
                add_generation_prompt=True,
                tokenize=False,
                enable_thinking=enable_thinking,
            )
            before, after = rendered.split(separator)

        def encode(text: str) -> Tensor:
            return torch.tensor(
                [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]], dtype=torch.long
            )

        question_ids = [encode(question + after + answer_prefix) for question in questions]
        if any(ids.shape[1] == 0 for ids in question_ids):
            raise InputError("A question has no tokens; leave question= out to let the model go on with the context.")
        context_ids = encode(before)
        limit = max_context_length
        if limit is None:
            longest = max((ids.shape[1] for ids in question_ids), default=0)
            limit = self._max_positions() - longest - max_new_tokens
        if limit < 1:
            raise InputError(f"There is no room for a context: its maximum length would be {limit} tokens.")
        if context_ids.shape[1] > limit:
            self._warn(f"The context is cut from {context_ids.shape[1]} to {limit} tokens (max_context_length).")
            context_ids = context_ids[:, :limit]
        return {"context_ids": context_ids, "question_ids": question_ids}

    def _forward(
        self,
        inputs: dict[str, Any],
        press: BasePress | None,
        cache: Cache | None,
        max_new_tokens: int,
        options: dict[str, Any],
    ) -> list[str]:
        use_coldpress(self.model)
        context_ids = inputs["context_ids"].to(self.model.device)
        if cache is None:
            cache = PressedCache(press)
        elif not isinstance(cache, PressedCache):
            raise CacheError(f"cache must be a coldpress.PressedCache, not {type(cache).__name__}.")
        earlier = cache.seen_tokens
        if press is not None and cache.press != press:
            if cache.press is not None or earlier:
                raise CacheError(
                    "The cache has another press or holds tokens; give an empty PressedCache, or no press."
                )
            with press(self.model):
                self._prefill(context_ids, cache)
        else:
            self._prefill(context_ids, cache)
        # The tokens of an earlier context are in the cache; generate only needs to know that they are there.
        placeholder = context_ids.new_zeros(1, earlier)
        return [
            self._answer(
                torch.cat([placeholder, context_ids, ids.to(context_ids.device)], 1), cache, max_new_tokens, options
            )
            for ids in inputs["question_ids"]
        ]

    def _prefill(self, context_ids: Tensor, cache: PressedCache) -> None:
        """Run the backbone only: the vocabulary-sized logits of a long context need more memory than its cache."""
        backbone = getattr(self.model, self.model.base_model_prefix, self.model)
        backbone(input_ids=context_ids, past_key_values=cache, use_cache=True)

    def _answer(self, ids: Tensor, cache: PressedCache, max_new_tokens: int, options: dict[str, Any]) -> str:
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, **options}
        if "generation_config" in options:
            options = {k: v for k, v in options.items() if k != "do_sample" or v}
        config = self.model.generation_config
        if config.pad_token_id is None and "pad_token_id" not in options and config.eos_token_id is not None:
            eos = config.eos_token_id
            options["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        branch = cache.fork()  # the answer grows on a branch, and the context stays as it is for the next question
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=branch, **options)
        return str(self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    def postprocess(self, answers: list[str], is_single: bool) -> dict[str, Any]:
        return {"answer": answers[0]} if is_single else {"answers": answers}

    def _max_positions(self) -> int:
        text = self.model.config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None) or 2**31
        return int(min(self.tokenizer.model_max_length, positions))

    @staticmethod
    def _warn(message: str) -> None:
        import warnings

        warnings.warn(message, UserWarning, stacklevel=2)


def _generation_options() -> list[str]:
    config = GenerationConfig()
    options = [name for name in vars(config) if not name.startswith("_") and name != "transformers_version"]
    return options + [n for n in inspect.signature(GenerationConfig.__init__).parameters if n not in ("self", "kwargs")]
