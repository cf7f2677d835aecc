"""One of the two libraries: run every case on every model and save what comes out.

    python -m benchmarks.parity.side coldpress|kvpress OUT [--smollm2 FILE] [--only NAME ...] [--models NAME ...]

kvpress patches attention for every model when it is imported, so each library has a process of its own.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from benchmarks.parity.case import Case, Library
from benchmarks.parity.cases import CASES
from benchmarks.parity.measure import Measurement, measure
from benchmarks.parity.models import Setting, as_chat, settings
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging


def libraries(name: str) -> dict[str, Library]:
    """The library called ``name``; kvpress with files of this machine, and also with its faults repaired."""
    if name == "coldpress":
        import coldpress

        return {"coldpress": Library(coldpress)}
    import kvpress
    from benchmarks.parity import local, repaired

    return {"kvpress": Library(local, kvpress), "repaired": Library(repaired, local, kvpress)}


def watch_scores(press: Any) -> Callable[[int], Tensor | None]:
    """Remember what the outermost ``score`` of a press of kvpress returns; gives the scores of a layer.

    A press that scores chunk by chunk calls it several times.
    """
    while press is not None and not hasattr(press, "score"):
        press = getattr(press, "press", None) or getattr(press, "base_press", None)
    if press is None:
        return lambda index: None
    seen: dict[int, list[Tensor]] = {}
    score = press.score

    def watched(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        scores: Tensor = score(module, *args, **kwargs)
        seen.setdefault(module.layer_idx, []).append(scores.float().clone())  # some presses change them afterwards
        return scores

    object.__setattr__(press, "score", watched)
    return lambda index: torch.cat(seen[index], dim=-1) if index in seen else None


def run_one(library: str, namespace: Library, setting: Setting, case: Case, ratio: float) -> Measurement:
    """One case at one ratio; what kvpress or the machine raises is part of the result."""
    model = setting.model
    try:
        press = case.make(namespace, ratio, model) if ratio else None
        if library == "coldpress":
            import coldpress

            coldpress.use_coldpress(model)
            return measure(setting, case, press, coldpress.PressedCache(), False, lambda index: None)
        model.set_attn_implementation(case.kvpress_attention)
        for layer in model.model.layers:  # fault G3: what the last press masked would stay masked
            layer.self_attn.masked_key_indices = None
        scores = watch_scores(press)
        return measure(setting, case, press, DynamicCache(), case.rerotated and press is not None, scores)
    except Exception as error:
        return Measurement(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", choices=["coldpress", "kvpress"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--models", nargs="*", help="names of models")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    cases = [case for case in CASES if not given.only or case.name in given.only]
    results: dict[tuple[str, str, float, str], Measurement] = {}
    for setting in settings(given.smollm2):
        if given.models and setting.name not in given.models:
            continue
        began = time.perf_counter()
        for case in (case for case in cases if case.runs_on(setting.name)):
            for variant, namespace in libraries(given.library).items():
                if variant == "repaired" and not case.repaired:
                    continue
                chat = as_chat(setting) if case.chat else nullcontext(setting)
                with chat as text, redirect_stdout(None):  # kvpress prints what it loads
                    for ratio in case.ratios:
                        result = run_one(given.library, namespace, text, case, ratio)
                        results[setting.name, case.name, ratio, variant] = result
        print(f"parity: {given.library} on {setting.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    versions = {"torch": torch.__version__.partition("+")[0], "transformers": __import__("transformers").__version__}
    saved = {key: vars(value) for key, value in results.items()}
    torch.save({"results": saved, "versions": versions}, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
