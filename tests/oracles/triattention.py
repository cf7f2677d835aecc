"""TriAttention's score by its formula, in complex numbers, pair by pair and distance by distance."""

from __future__ import annotations

import cmath
import statistics

from torch import Tensor


def pairs_of(width: int, neighbours: bool) -> list[tuple[int, int]]:
    """The two channels of each pair that turns together: halves, or neighbours as in GPT-J."""
    return [(2 * f, 2 * f + 1) if neighbours else (f, f + width // 2) for f in range(width // 2)]


def triattention(
    queries: Tensor, keys: Tensor, at: Tensor, end: int, width: int, window: int, offsets: list[int], neighbours: bool
) -> list[list[float]]:
    """Scores ``[Hkv][T]``.

    Args:
        queries: float64 ``[Hq, n, D]``, of the text that statistics are of, before rotation.
        keys: float64 ``[Hkv, T, D]``, before rotation, of tokens at positions ``at`` ``[Hkv, T]``.
        end: length of the text; its last ``window`` tokens do not count in the means.
    """
    scores, pairs = [], pairs_of(width, neighbours)
    for head, own in enumerate(keys):
        by_query_head = []
        for q in queries[head * len(queries) // len(keys) : (head + 1) * len(queries) // len(keys)].tolist():
            s = [sum(sum(x[d] for x in q) / len(q) * float(k[d]) for d in range(width, len(k))) for k in own]
            for f, (a, b) in enumerate(pairs):
                mean = sum(complex(x[a], x[b]) for x in q) / len(q)
                spread, w = sum(abs(complex(x[a], x[b])) for x in q) / len(q) - abs(mean), 10_000.0 ** (-2 * f / width)
                for t, (k, p) in enumerate(zip(own.tolist(), at[head].tolist(), strict=True)):
                    z = mean * complex(k[a], k[b]).conjugate()
                    turned = [(z * cmath.exp(1j * w * (end - 1 - p + d))).real for d in offsets]
                    s[t] += sum(turned) / len(offsets) + spread * abs(complex(k[a], k[b]))
            counted = [x for x, p in zip(s, at[head].tolist(), strict=True) if p < end - window]
            mean, deviation = statistics.mean(counted), statistics.pstdev(counted)
            by_query_head.append([(x - mean) / deviation for x in s])
        scores.append([max(each) for each in zip(*by_query_head, strict=True)])
    return scores
