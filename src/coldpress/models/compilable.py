"""What a compiled step can decode, and from what: asked before a long measurement, and again at each call."""

from __future__ import annotations

import torch
from transformers.modeling_utils import PreTrainedModel

from coldpress.cache.roles import Roles
from coldpress.core.press import Press, parts
from coldpress.errors import CacheError, ModelError
from coldpress.stores.bits import KVBits
from coldpress.stores.codec import Codec
from coldpress.stores.rotated import RotatedBits

__all__ = ["check_compilable", "check_compiler", "check_model", "check_press", "goes_on", "unfit"]

_LEAVE = "leave compiled() out"


def goes_on(press: Press | None) -> bool:
    """Whether a press has work to do after each token."""
    return press is not None and (press.evicts_while_decoding or bool(Roles.of(press).observers))


def check_compilable(press: Press | None, storage: Codec | None, device: torch.device, leave: str = _LEAVE) -> None:
    """Raise :class:`CacheError` if what ``press`` keeps, stored by ``storage``, cannot be decoded by a compiled step.

    Args:
        device: where the pairs are.
        leave: what to do about it.
    """
    check_press(press, leave)
    is_rotated = isinstance(storage, RotatedBits) and device.type == "cpu"
    has_channels = press is None or all("channels" not in part.changes for part in parts(press))
    if not has_channels or not (storage is None or is_rotated):
        raise CacheError(unfit(storage, leave))


def check_press(press: Press | None, leave: str = _LEAVE) -> None:
    """Raise :class:`CacheError` if ``press`` does what a compiled step cannot."""
    if press is None:
        return
    if Roles.of(press).readers:
        raise CacheError(f"{press!r} chooses what each query reads, which cannot be compiled; {leave}.")
    if goes_on(press) and any(part.needs_hidden_states for part in parts(press)):
        raise CacheError(
            f"{press!r} looks at hidden states while decoding, which a compiled step does not tell; {leave}."
        )


def unfit(storage: Codec | None, leave: str = _LEAVE) -> str:
    """Why the pairs of a cache have no fixed shape."""
    if isinstance(storage, KVBits):
        return (
            f"kv_bits={storage.bits} stores groups of tokens, which a compiled step cannot read; give kv_bits "
            f"k8v4 or k4v4, which are RotatedBits(8, 4) and (4, 4) and encode pairs one by one, or {leave}."
        )
    return (
        "A compiled step needs pairs as the model made them, or on the CPU in RotatedBits: not keys in fewer channels "
        f"(ThinK) or a codec of your own; {leave}."
    )


def check_model(model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` if ``model`` has no compiled step."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ModelError(f"{name} has layers of {', '.join(sorted(kinds))}, which a compiled step does not know.")
    rotary = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", rotary.get("type"))
    if kind in ("dynamic", "longrope"):
        raise ModelError(f"{name} has rotary frequencies that depend on the text ({kind}), which cannot be compiled.")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ModelError(f"{name} is spread over several devices; a compiled step needs all weights on one.")


def check_compiler(device: torch.device) -> None:
    """Raise :class:`ModelError` if torch.compile would look for a C++ compiler and find none."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise ModelError(
            "torch.compile needs a C++ compiler on the CPU, and finds none; install one, such as g++, name it in CXX, "
            "or leave --compile out."
        ) from error
