"""What an evaluation was asked for, and which options contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coldpress.bases.registry import NO_PRESS
from coldpress.bases.scorer import BUDGETS
from coldpress.errors import InputError
from coldpress.stores.bits import KVBits

PPL_MODES = ("prefix", "streaming")
PPL_PRESETS = ("hf-strided", "gptq", "llamacpp", "lm-eval")
POSITIONS = ("original", "rerotate")
STREAM_CHUNK = 64

__all__ = ["POSITIONS", "PPL_MODES", "PPL_PRESETS", "Settings"]


@dataclass(frozen=True)
class Settings:
    """Everything an evaluation was asked for; the command line's options have these names.

    Raises:
        InputError: options that contradict each other, or that can never work.
    """

    model: str = "EleutherAI/pythia-70m"
    revision: str | None = None
    dataset: str = "wikitext"
    subset: str | None = None
    split: str = "test"
    sample_idx: int | None = None
    text_file: str | None = None
    press: tuple[str, ...] = (NO_PRESS,)
    compression_ratio: tuple[float, ...] = ()  # (0.5,) if no budget is given
    budget_tokens: tuple[int, ...] = ()
    budget_bytes: tuple[int, ...] = ()
    press_args: tuple[tuple[str, Any], ...] = ()
    chunk_tokens: int | None = None
    kv_bits: tuple[int | str, ...] = ()  # of the older pairs, instead of as they are
    kv_group_size: int = KVBits.group_size
    kv_residual_tokens: int = KVBits.residual_tokens
    ppl_apply_press: bool = False
    ppl_mode: str | None = None  # prefix or streaming
    ppl_preset: str | None = None  # how others measure the uncompressed model
    add_bos: bool | None = None  # before windows and texts; None: as the tokenizer begins a text
    stream_chunk: int | None = None
    positions: str | None = None  # original or rerotate; rerotate if a stream is read
    speed_only: bool = False
    ppl_only: bool = False
    speed_decode_only: bool = False
    compile: bool = False  # the timed decoding
    max_length: int | None = None
    stride: int | None = None
    context_tokens: int | None = None
    target_tokens: int | None = None
    limit_tokens: int | None = None
    max_documents: int | None = None
    max_windows: int | None = None  # of each document
    greedy_tokens: int = 0
    batch_size: int = 1
    context_limit: int = 4096
    max_new_tokens: int = 200
    min_new_tokens: int | None = None
    repetitions: int = 5
    warmup: int = 1
    allow_extrapolation: bool = False
    attn_implementation: str = "sdpa"
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    tp_plan: str | None = None
    engine: str = "local"
    ray_address: str | None = None
    workers: int | None = None
    seed: int = 0
    output_dir: str = "results/perplexity"

    def __post_init__(self) -> None:
        sizes = [f"--{name}" for name in ("compression_ratio", *BUDGETS) if getattr(self, name)]
        if len(sizes) > 1:
            raise InputError(f"{' and '.join(sizes)} both say how much is kept; give one of them.")
        if not sizes:
            object.__setattr__(self, "compression_ratio", (0.5,))
        if self.ppl_preset is not None:
            self._check_preset()
        self._check_mode()
        if self.speed_only and (self.ppl_apply_press or self.ppl_only):
            raise InputError("--speed_only measures no perplexity; leave it out, or --ppl_apply_press and --ppl_only.")
        if self.speed_only and self.add_bos is not None:
            raise InputError("--add_bos is for perplexity, and --speed_only measures none; leave one of them out.")
        if self.chunk_tokens is not None and not self.ppl_apply_press and self.ppl_only:
            raise InputError(
                "--chunk_tokens cuts up the prompt that a press compresses; --ppl_only alone has none: add "
                "--ppl_apply_press."
            )
        for name in ("max_documents", "max_windows", "greedy_tokens", "context_tokens", "target_tokens"):
            if getattr(self, name) and not self.ppl_apply_press and (name != "max_documents" or self.ppl_mode is None):
                raise InputError(f"--{name} is for perplexity under presses; add --ppl_apply_press, or leave it out.")
        for name in ("max_length", "stride"):
            if getattr(self, name) is not None and self.speed_only:
                raise InputError(f"--{name} is for perplexity, and --speed_only measures none; leave one of them out.")
        if self.speed_only and self.batch_size != 1:
            raise InputError("--batch_size is for perplexity, and --speed_only measures none; leave one of them out.")
        for name in ("kv_group_size", "kv_residual_tokens"):
            if getattr(self, name) != getattr(Settings, name) and not self.kv_bits:
                raise InputError(f"--{name} says how pairs are stored in few bits; add --kv_bits, or leave it out.")
        if self.engine != "local" and not self.ppl_apply_press:
            raise InputError(
                f"--engine {self.engine} measures windows under presses, and none are asked for; add "
                "--ppl_apply_press, or leave --engine out."
            )
        if self.ppl_only and self.speed_decode_only:
            raise InputError("--ppl_only measures no speed; leave it out, or --speed_decode_only.")
        if self.compile and self.ppl_only:
            raise InputError("--compile is for decoding, and no speed is measured here; leave it out.")
        if self.compile and not self.warmup:
            raise InputError("--compile compiles in the untimed rounds; give --warmup 1 or more.")
        if not self.ppl_only and self.max_new_tokens < 2:
            raise InputError(f"--max_new_tokens must be at least 2 to time decoding, got {self.max_new_tokens}.")
        if not self.ppl_only and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise InputError(
                f"--min_new_tokens {self.min_new_tokens} is more than --max_new_tokens {self.max_new_tokens}."
            )

    @property
    def loading(self) -> dict[str, Any]:
        """The options of load_model beside the name."""
        names = ("device", "dtype", "attn_implementation", "revision", "device_map", "tp_plan")
        return {name: getattr(self, name) for name in names}

    @property
    def cluster(self) -> dict[str, Any]:
        """The options of the engine."""
        return {"ray_address": self.ray_address, "workers": self.workers}

    def _check_preset(self) -> None:
        """Fill in what follows from ``--ppl_preset``; raise :class:`InputError` if it contradicts other options."""
        if self.ppl_preset not in PPL_PRESETS:
            raise InputError(f"--ppl_preset must be one of {', '.join(PPL_PRESETS)}, got {self.ppl_preset!r}.")
        asked = [name for name in ("ppl_apply_press", "ppl_mode", "kv_bits") if getattr(self, name)]
        if tuple(self.press) != (NO_PRESS,) or asked:
            what = f"--{asked[0]}" if asked else f"--press {' '.join(self.press)}"
            raise InputError(
                f"--ppl_preset {self.ppl_preset} is the uncompressed model's perplexity, as others measure it; leave "
                f"{what} out, or measure presses with --ppl_apply_press and without a preset."
            )
        for name in ("stride", "context_tokens", "target_tokens"):
            if getattr(self, name) is not None:
                raise InputError(f"--ppl_preset {self.ppl_preset} says how windows lie; leave --{name} out.")
        if self.add_bos is not None:
            raise InputError(f"--ppl_preset {self.ppl_preset} says how texts begin; leave --add_bos out.")
        for name in ("speed_only", "speed_decode_only", "compile"):
            if getattr(self, name):
                raise InputError(f"--ppl_preset {self.ppl_preset} measures no speed; leave --{name} out.")
        object.__setattr__(self, "ppl_only", True)

    def _check_mode(self) -> None:
        """Fill in what follows from ``--ppl_mode``; raise :class:`InputError` if it contradicts other options."""
        if self.ppl_mode not in (None, *PPL_MODES):
            raise InputError(f"--ppl_mode must be {' or '.join(PPL_MODES)}, got {self.ppl_mode!r}.")
        if self.positions not in (None, *POSITIONS):
            raise InputError(f"--positions must be {' or '.join(POSITIONS)}, got {self.positions!r}.")
        if self.ppl_mode == "streaming":
            if self.ppl_apply_press or self.speed_only or self.speed_decode_only:
                raise InputError(
                    "--ppl_mode streaming reads whole texts and measures no speed; leave --ppl_apply_press, "
                    "--speed_only and --speed_decode_only out."
                )
            for name in ("context_tokens", "target_tokens", "stride", "max_length"):
                if getattr(self, name) is not None:
                    raise InputError(f"--ppl_mode streaming has no windows; leave --{name} out.")
            if self.chunk_tokens is not None:
                raise InputError(
                    "--ppl_mode streaming reads --stream_chunk tokens at a time; leave --chunk_tokens out."
                )
            if self.kv_bits:
                raise InputError("--ppl_mode streaming evicts again and again, and --kv_bits cannot; leave one out.")
            if self.batch_size != 1:
                raise InputError("--ppl_mode streaming reads one text after the other; leave --batch_size out.")
            object.__setattr__(self, "ppl_only", True)
            object.__setattr__(self, "stream_chunk", self.stream_chunk or STREAM_CHUNK)
            object.__setattr__(self, "positions", self.positions or "rerotate")
            return
        for name in ("stream_chunk", "positions"):
            if getattr(self, name) is not None:
                raise InputError(f"--{name} belongs to --ppl_mode streaming.")
        if self.ppl_mode == "prefix":
            object.__setattr__(self, "ppl_apply_press", True)
        elif self.ppl_apply_press:
            object.__setattr__(self, "ppl_mode", "prefix")
