"""coldpress: training-free compression of the key-value cache for Hugging Face decoder models.

``import coldpress`` takes no time, and from then on transformers knows the attention backend and the pipeline's task.
torch and transformers, which take seconds, come with the first name that is asked for.
"""

# ruff: noqa: F405

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from coldpress.registration import register as _register
from coldpress.version import VERSION as __version__

if TYPE_CHECKING:
    from coldpress.public import *  # noqa: F403

__all__ = [
    "AdaKVPress",
    "AttentionMatchingPress",
    "BasePress",
    "BlockPress",
    "BoundaryPress",
    "CAMPress",
    "CURPress",
    "CapPress",
    "ChunkKVPress",
    "ChunkPress",
    "Codec",
    "ColdpressError",
    "Column",
    "CompactorPress",
    "ComposedPress",
    "CompressionRatioDecodingPress",
    "CriticalAdaKVPress",
    "CriticalKVPress",
    "DMSPress",
    "DecodingPress",
    "DefensiveKVPress",
    "DuoAttentionPress",
    "EntropyGatedChunkKVPress",
    "ExpectedAttentionPress",
    "ExpectedAttentionStatsPress",
    "FairPress",
    "FastKVzipPress",
    "FinchPress",
    "GKVPress",
    "H2OPress",
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
    "KeyformerPress",
    "KnormPress",
    "LUKVPress",
    "LagKVPress",
    "LayerDefensiveKVPress",
    "LayerView",
    "LeverageScorePress",
    "MassCAMPress",
    "MassMergingPress",
    "MergingPress",
    "Mixed",
    "MomentKVPress",
    "MorphKVPress",
    "NonCausalAttnPress",
    "ObservedAttentionPress",
    "PerLayerCompressionPress",
    "PrefillDecodingPress",
    "PressedCache",
    "PyramidKVPress",
    "QFilterPress",
    "QualityPress",
    "QuestPress",
    "RKVPress",
    "RaaSPress",
    "RandomPress",
    "RestoreKVPress",
    "RotatedBits",
    "SampledDefensiveKVPress",
    "ScissorhandsPress",
    "ScorerPress",
    "SimLayerKVPress",
    "SnapKVPress",
    "Snapshot",
    "Snapshots",
    "SparQPress",
    "StreamingLLMPress",
    "TOVAPress",
    "ThinKPress",
    "TokenCodec",
    "TriAttentionPress",
    "WrapperPress",
    "__version__",
    "catalogue",
    "compiled",
    "demo_model",
    "inspect",
    "make_press",
    "prefill",
    "press_names",
    "presses",
    "register",
    "stand_at",
    "use_coldpress",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not TYPE_CHECKING:  # or else any name would do

    def __getattr__(name: str) -> Any:
        """A public name, or a module of the package."""
        if name in __all__:
            public = vars(import_module("coldpress.public"))
            globals().update({name: public[name] for name in __all__ if name in public})
            return public[name]
        if not name.startswith("_") and find_spec(f"coldpress.{name}") is not None:
            return import_module(f"coldpress.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register()
