"""What FairPress keeps of one head: quotas counted by hand, and tokens taken from a sorted list."""

from __future__ import annotations


def fair(scores: dict[int, float], n: int, spans: list[tuple[int, int]], always: list[int], end: int) -> list[int]:
    """Tokens that a head keeps of those that it holds.

    Args:
        scores: of the tokens that are held, by position.
        n: how many are kept, ``always`` among them.
        end: length of the text.
    """
    inside = [[t for t in range(a, min(b, end))] for a, b in spans]
    texts = [*inside, [t for t in range(end) if not any(t in own for own in inside)]]
    quotas, forced = {}, {i: [t for t in always if t in own] for i, own in enumerate(texts)}
    while True:
        others = [i for i in range(len(texts)) if i not in quotas]
        left, total = n - sum(quotas.values()), sum(len(texts[i]) for i in others)
        shares = {i: left * len(texts[i]) // max(1, total) for i in others}
        more = {i: len(forced[i]) for i in others if len(forced[i]) > shares[i]}
        if not more:
            quotas |= shares
            break
        quotas |= more
    best = sorted(scores, key=lambda t: (t not in always, -scores[t], t))
    kept = {t for i, own in enumerate(texts) for t in [t for t in best if t in own][: quotas[i]]}
    return sorted([*kept, *[t for t in best if t not in kept][: n - len(kept)]])
