"""A CUDA device that is pretended: numbers stay in the CPU's memory, and what a real device refuses is refused.

Inside ``with PretendedCuda() as device:`` a tensor that was made on ``cuda``, or that came of one, says that it is
there. A call that mixes it with a tensor of the CPU raises, as torch does, unless that one is a single number or an
index. What makes the host wait for the device is counted. So code that makes a tensor and forgets ``device=`` is found
on a machine without a GPU; kernels, dtypes that they lack, and speed are not.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["CUDA", "PretendedCuda", "moved"]

CUDA = torch.device("cuda", 7)  # a number of its own: what is kept for it is not taken for a real device's
_MARK = "_is_pretended"

_GETTERS = {Tensor.device.__get__: CUDA, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}  # type: ignore[attr-defined]
_WAITS = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "equal",
    "masked_select",
    "unique",
}
_HOST = {
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__repr__",
    "__format__",
    "__len__",
    "equal",
    "is_nonzero",
}
_MIXES = {
    "copy_",
    "__setitem__",
    "set_",
    "is_same_size",
    "__set__",
}  # torch copies between devices, or looks at no numbers


def moved(value: Any) -> Any:
    """A tensor, or the tensors of a module in place, on the pretended device."""
    if isinstance(value, nn.Module):
        for tensor in (*value.parameters(), *value.buffers()):
            setattr(tensor, _MARK, True)
        return value
    own = value.detach().clone()
    setattr(own, _MARK, True)
    return own


class PretendedCuda(TorchFunctionMode):
    """The device.

    Attributes:
        waits: how often the host waited, by the name of the function; set it to an empty Counter to count anew.
        uploads: how often numbers of the host were copied to the device, likewise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GETTERS:
            return _GETTERS[func] if _is_there(args[0]) else func(*args)
        name = getattr(func, "__name__", "")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if _is_there(tensor)]
        if there and name == "numpy":
            raise TypeError("can't convert cuda:7 device type tensor to numpy. Use Tensor.cpu()")
        target = self._target(name, args, kwargs)
        args, kwargs = _on_host(args, kwargs)
        if there and target is None and name not in _MIXES:
            self._check(name, args, tensors, there)
        if there and (name in _WAITS or (target is not None and target.type == "cpu") or _picks(name, args)):
            self.waits[name] += 1
        if target is not None and target.type == "cuda" and not there and (tensors or name in ("tensor", "as_tensor")):
            self.uploads[name] += 1
        result = func(*args, **kwargs)
        if name in _HOST:
            return result
        is_there = bool(there) if target is None else target.type == "cuda"
        if name in _MIXES:
            is_there = bool(args) and isinstance(args[0], Tensor) and _is_there(args[0])
        if target is not None and any(result is tensor and _is_there(tensor) != is_there for tensor in tensors):
            result = result.clone()  # on the host nothing was to be done
        return _marked(result, is_there, tensors)

    def _target(self, name: str, args: Any, kwargs: Any) -> torch.device | None:
        """The device that a call names."""
        if name == "cpu":
            return torch.device("cpu")
        if name == "cuda":
            return CUDA
        device = kwargs.get("device")
        if device is None and name in ("to", "empty", "zeros", "ones"):
            device = next((arg for arg in args[1:] if isinstance(arg, torch.device)), None)
            if name == "to" and device is None:
                device = next((arg for arg in args[1:] if isinstance(arg, str)), None)
                other = next((arg for arg in args[1:] if isinstance(arg, Tensor)), None)
                if other is not None:
                    device = CUDA if _is_there(other) else torch.device("cpu")
        return None if device is None else torch.device(device)

    def _check(self, name: str, args: Any, tensors: list[Tensor], there: list[Tensor]) -> None:
        here = [tensor for tensor in tensors if not _is_there(tensor) and _dim(tensor) > 0]
        if name in ("__getitem__", "index_put_", "index_put") and _is_there(args[0]):
            return  # an index may be on the host
        if here and len(there) < len(tensors):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two, cuda:7 and cpu! ({name})"
            )


def _is_there(tensor: Tensor) -> bool:
    return _MARK in tensor.__dict__


def _dim(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        return tensor.dim()


def _picks(name: str, args: Any) -> bool:
    """Whether this is an index of booleans, whose result has a size that the host does not know."""
    if name not in ("__getitem__", "__setitem__"):
        return False
    with torch._C.DisableTorchFunction():
        return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1]))


def _on_host(args: Any, kwargs: Any) -> Any:
    """The same arguments with the CPU in the place of the device."""

    def host(device: torch.device) -> torch.device:
        return torch.device("cpu") if device.type == "cuda" else device

    args, kwargs = tree_map_only(torch.device, host, (args, kwargs))
    args = tuple("cpu" if isinstance(arg, str) and arg.startswith("cuda") else arg for arg in args)
    if isinstance(kwargs.get("device"), str):
        kwargs["device"] = "cpu"
    if isinstance(kwargs.get("device"), int):
        kwargs["device"] = "cpu"
    return args, kwargs


def _marked(result: Any, is_there: bool, given: list[Tensor]) -> Any:
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            if is_there:
                setattr(leaf, _MARK, True)
            elif not any(leaf is tensor for tensor in given):
                leaf.__dict__.pop(_MARK, None)
    return result
