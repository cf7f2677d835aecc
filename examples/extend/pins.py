"""Pins: spans of tokens that nothing may evict, such as the system prompt of a chat.

``PressedCache(press, pin=[(0, 40)])`` keeps tokens 0 .. 39 of each row, and ``pin=[[(0, 40)], [(0, 12), (30, 33)]]``
those of two rows, in every layer and head, under every press. They count towards the budget, and one that is too small
for them is refused. Tokens are counted without padding. Run this file to see it: ``python examples/extend/pins.py``.
"""

from __future__ import annotations

from typing import Any


def span_of(text: str, part: str, tokenizer: Any) -> tuple[int, int]:
    """The tokens of ``text`` that hold ``part``: the first one, and the one after the last."""
    start = text.index(part)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (first, stop) in enumerate(offsets) if first < start + len(part) and stop > start]
    return inside[0], inside[-1] + 1


def main() -> None:
    from coldpress import PressedCache, SnapKVPress, prefill
    from coldpress.loading.models import load_model

    loaded = load_model("demo")
    system = "You are a careful editor. Answer in one sentence."
    text = f"System: {system}\nUser: {'Here is a long story. ' * 40}What is it about?\nEditor:"  # or a chat template
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(loaded.device)
    span = span_of(text, system, loaded.tokenizer)
    for pin in (None, [span]):
        cache = PressedCache(SnapKVPress(0.8, window_size=16), pin=pin)
        prefill(loaded.model, ids, cache)
        kept = [(layer.positions() >= span[0]) & (layer.positions() < span[1]) for layer in cache.pressed_layers()]
        share = sum(int(mask.sum()) for mask in kept) / sum(mask[..., 0].numel() for mask in kept) / (span[1] - span[0])
        print(f"pin={pin}: {share:.0%} of the system prompt is kept, and {cache.achieved_ratio():.0%} of all is gone")


if __name__ == "__main__":
    main()
