"""What somebody may have written into a file."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

INTS = (-1, 0, 1, 3, 2**31, 2**63, 2**70)
OTHERS = (None, True, False, "", "x", 1.5, float("nan"), [], {}, [1, 2], {"class": "x"}, *INTS)


def changed_tensors(tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name, tensor in tensors.items():
        rest = {key: value for key, value in tensors.items() if key != name}
        yield f"{name} delete", rest
        yield f"{name} renamed", rest | {f"{name}x": tensor}
        kinds = (torch.float16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool)
        for dtype in kinds:
            if dtype != tensor.dtype:
                yield f"{name} {dtype}", rest | {name: tensor.to(dtype)}
        shapes = [tensor[None], tensor.flatten(), tensor[:0], torch.cat([tensor, tensor])]
        for dim in range(tensor.dim()):
            shapes += [tensor.narrow(dim, 0, max(0, tensor.shape[dim] - 1)), torch.cat([tensor, tensor], dim)]
        if tensor.dim() > 1:
            shapes.append(tensor.transpose(-1, -2))
        for shaped in shapes:
            if shaped.shape != tensor.shape:
                yield f"{name} {tuple(shaped.shape)}", rest | {name: shaped.contiguous()}
        if tensor.numel() and tensor.is_floating_point():
            for number in (torch.nan, torch.inf):
                bad = tensor.clone()
                bad.view(-1)[-1] = number
                yield f"{name} {number}", rest | {name: bad}
        elif tensor.numel() and tensor.dtype != torch.bool:
            info = torch.iinfo(tensor.dtype)
            for number in (info.min, info.max, -1, 0, 7):
                bad = tensor.clone()
                bad.view(-1)[0] = max(number, info.min)
                yield f"{name} first {number}", rest | {name: bad}
        if tensor.dim():
            yield f"{name} flipped", rest | {name: tensor.flip(-1)}
