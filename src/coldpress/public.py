"""The public names of coldpress. ``import coldpress`` takes them from here when the first of them is asked for.

Whatever stands here stands in ``__all__`` of the package too.
"""

# ruff: noqa: F401

from __future__ import annotations

import coldpress.presses as presses
from coldpress.architecture.rope import stand_at
from coldpress.bases.press import BasePress
from coldpress.bases.registry import catalogue, make_press, press_names, register
from coldpress.bases.scorer import ScorerPress
from coldpress.bases.wrapper import WrapperPress
from coldpress.cache.pressed import PressedCache
from coldpress.core.column import Column
from coldpress.core.kept import Kept
from coldpress.core.view import LayerView
from coldpress.errors import ColdpressError
from coldpress.io.demo import demo_model
from coldpress.models.compiled import compiled
from coldpress.models.inspection import Inspection, inspect
from coldpress.models.pipeline import KVPressTextGenerationPipeline
from coldpress.models.prompts import prefill
from coldpress.models.supported import use_coldpress
from coldpress.presses.adakv import AdaKVPress
from coldpress.presses.attention_matching import AttentionMatchingPress
from coldpress.presses.block import BlockPress
from coldpress.presses.boundary import BoundaryPress
from coldpress.presses.cam import CAMPress, MassCAMPress
from coldpress.presses.cap import CapPress
from coldpress.presses.chunk import ChunkPress
from coldpress.presses.chunkkv import ChunkKVPress
from coldpress.presses.compactor import CompactorPress
from coldpress.presses.composed import ComposedPress
from coldpress.presses.criticalkv import CriticalAdaKVPress, CriticalKVPress
from coldpress.presses.cur import CURPress
from coldpress.presses.decoding import CompressionRatioDecodingPress, DecodingPress, PrefillDecodingPress
from coldpress.presses.defensive import DefensiveKVPress, LayerDefensiveKVPress
from coldpress.presses.dms import DMSPress
from coldpress.presses.duo_attention import DuoAttentionPress
from coldpress.presses.entropy_gated_chunkkv import EntropyGatedChunkKVPress
from coldpress.presses.expected_attention import ExpectedAttentionPress
from coldpress.presses.expected_attention_with_stats import ExpectedAttentionStatsPress
from coldpress.presses.fair import FairPress
from coldpress.presses.fastkvzip import FastKVzipPress
from coldpress.presses.finch import FinchPress
from coldpress.presses.gkv import GKVPress
from coldpress.presses.h2o import H2OPress
from coldpress.presses.key_rerotation import KeyRerotationPress
from coldpress.presses.keydiff import KeyDiffPress
from coldpress.presses.keyformer import KeyformerPress
from coldpress.presses.knorm import KnormPress
from coldpress.presses.kvcompose import KVComposePress
from coldpress.presses.kvgrad import KVgradPress
from coldpress.presses.kvzap import KVzapPress
from coldpress.presses.kvzip import KVzipPress
from coldpress.presses.lagkv import LagKVPress
from coldpress.presses.leverage import LeverageScorePress
from coldpress.presses.lukv import LUKVPress
from coldpress.presses.merging import MassMergingPress, MergingPress
from coldpress.presses.momentkv import MomentKVPress
from coldpress.presses.morphkv import MorphKVPress
from coldpress.presses.non_causal_attention import NonCausalAttnPress
from coldpress.presses.observed_attention import ObservedAttentionPress
from coldpress.presses.per_layer_compression import PerLayerCompressionPress
from coldpress.presses.pyramidkv import PyramidKVPress
from coldpress.presses.qfilter import QFilterPress
from coldpress.presses.quality import QualityPress
from coldpress.presses.quest import QuestPress
from coldpress.presses.raas import RaaSPress
from coldpress.presses.random import RandomPress
from coldpress.presses.restorekv import RestoreKVPress
from coldpress.presses.rkv import RKVPress
from coldpress.presses.sampled_defensive import SampledDefensiveKVPress
from coldpress.presses.scissorhands import ScissorhandsPress
from coldpress.presses.simlayerkv import SimLayerKVPress
from coldpress.presses.snapkv import SnapKVPress
from coldpress.presses.sparq import SparQPress
from coldpress.presses.streaming_llm import StreamingLLMPress
from coldpress.presses.think import ThinKPress
from coldpress.presses.tova import TOVAPress
from coldpress.presses.triattention import TriAttentionPress
from coldpress.serving.snapshot import Snapshot
from coldpress.serving.snapshots import Snapshots
from coldpress.stores.bits import KVBits
from coldpress.stores.codec import Codec, TokenCodec
from coldpress.stores.mixed import Mixed
from coldpress.stores.rotated import RotatedBits
