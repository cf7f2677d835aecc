"""coldpress: training-free compression of the key-value cache for Hugging Face decoder models."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from coldpress import presses
from coldpress.attention import register as _register_backends
from coldpress.attention import use_coldpress
from coldpress.cache import PressedCache
from coldpress.chunks import prefill
from coldpress.compiling import compiled
from coldpress.errors import ColdpressError
from coldpress.inspecting import Inspection, inspect
from coldpress.pipeline import KVPressTextGenerationPipeline
from coldpress.pipeline import register as _register_tasks
from coldpress.presses.adakv import AdaKVPress
from coldpress.presses.base import BasePress, ScorerPress
from coldpress.presses.block import BlockPress
from coldpress.presses.cam import CAMPress
from coldpress.presses.cap import CapPress
from coldpress.presses.chunk import ChunkPress
from coldpress.presses.chunkkv import ChunkKVPress
from coldpress.presses.compactor import CompactorPress
from coldpress.presses.composed import ComposedPress
from coldpress.presses.criticalkv import CriticalAdaKVPress, CriticalKVPress
from coldpress.presses.cur import CURPress
from coldpress.presses.decoding import CompressionRatioDecodingPress, DecodingPress, PrefillDecodingPress
from coldpress.presses.dms import DMSPress
from coldpress.presses.duo_attention import DuoAttentionPress
from coldpress.presses.entropy_gated_chunkkv import EntropyGatedChunkKVPress
from coldpress.presses.expected_attention import ExpectedAttentionPress
from coldpress.presses.expected_attention_with_stats import ExpectedAttentionStatsPress
from coldpress.presses.fastkvzip import FastKVzipPress
from coldpress.presses.finch import FinchPress
from coldpress.presses.key_rerotation import KeyRerotationPress
from coldpress.presses.keydiff import KeyDiffPress
from coldpress.presses.knorm import KnormPress
from coldpress.presses.kvcompose import KVComposePress
from coldpress.presses.kvgrad import KVgradPress
from coldpress.presses.kvzap import KVzapPress
from coldpress.presses.kvzip import KVzipPress
from coldpress.presses.lagkv import LagKVPress
from coldpress.presses.leverage import LeverageScorePress
from coldpress.presses.lukv import LUKVPress
from coldpress.presses.merging import MergingPress
from coldpress.presses.non_causal_attention import NonCausalAttnPress
from coldpress.presses.observed_attention import ObservedAttentionPress
from coldpress.presses.per_layer_compression import PerLayerCompressionPress
from coldpress.presses.pyramidkv import PyramidKVPress
from coldpress.presses.qfilter import QFilterPress
from coldpress.presses.random import RandomPress
from coldpress.presses.registry import catalogue, make_press, press_names
from coldpress.presses.restorekv import RestoreKVPress
from coldpress.presses.simlayerkv import SimLayerKVPress
from coldpress.presses.snapkv import SnapKVPress
from coldpress.presses.streaming_llm import StreamingLLMPress
from coldpress.presses.think import ThinKPress
from coldpress.presses.tova import TOVAPress
from coldpress.presses.wrapper import WrapperPress
from coldpress.quantised import KVBits
from coldpress.view import Kept, LayerView

try:
    __version__ = version("coldpress")
except PackageNotFoundError:  # imported from a source tree that was not installed
    __version__ = "0+unknown"

_register_backends()
_register_tasks()

__all__ = [
    "AdaKVPress",
    "BasePress",
    "BlockPress",
    "CAMPress",
    "CURPress",
    "CapPress",
    "ChunkKVPress",
    "ChunkPress",
    "ColdpressError",
    "CompactorPress",
    "ComposedPress",
    "CompressionRatioDecodingPress",
    "CriticalAdaKVPress",
    "CriticalKVPress",
    "DMSPress",
    "DecodingPress",
    "DuoAttentionPress",
    "EntropyGatedChunkKVPress",
    "ExpectedAttentionPress",
    "ExpectedAttentionStatsPress",
    "FastKVzipPress",
    "FinchPress",
    "Inspection",
    "KVBits",
    "KVComposePress",
    "KVPressTextGenerationPipeline",
    "KVgradPress",
    "KVzapPress",
    "KVzipPress",
    "Kept",
    "KeyDiffPress",
    "KeyRerotationPress",
    "KnormPress",
    "LUKVPress",
    "LagKVPress",
    "LayerView",
    "LeverageScorePress",
    "MergingPress",
    "NonCausalAttnPress",
    "ObservedAttentionPress",
    "PerLayerCompressionPress",
    "PrefillDecodingPress",
    "PressedCache",
    "PyramidKVPress",
    "QFilterPress",
    "RandomPress",
    "RestoreKVPress",
    "ScorerPress",
    "SimLayerKVPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
    "ThinKPress",
    "WrapperPress",
    "__version__",
    "catalogue",
    "compiled",
    "inspect",
    "make_press",
    "prefill",
    "press_names",
    "presses",
    "use_coldpress",
]
