"""From records to a ranking: mean KL of each press, and its rank with the interval of a paired bootstrap."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np

N_RESAMPLES = 2000
KEPT = ("press", "press_config", "compression_ratio", "protocol", "status", "windows", "scored_tokens", "delta_nll")
KEPT += ("delta_nll_ci95", "same_top1", "kld", "kv_bytes", "kv_bytes_baseline", "baseline_ppl", "loss")
KEPT += ("model", "model_source", "dataset", "subset", "dtype", "weights_fingerprint", "text_sha256", "error")
KEPT += ("ttft_s", "tpot_ms", "context_tokens", "target_tokens", "batch_size", "timestamp")


def condensed(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What the board and its tables need of the records, and the command that measures each row again."""
    rows = []
    for record in records:
        row = {name: record[name] for name in KEPT if record.get(name) is not None}
        row["per_window"] = [
            [w["document"], w["start"], round(w["kld"], 7)] for w in record.get("per_window") or () if "kld" in w
        ]
        if record.get("tasks"):
            row["tasks"] = [{name: task[name] for name in ("task", "n", "score")} for task in record["tasks"]]
        row["command"] = command_of(record)
        rows.append({name: value for name, value in row.items() if value != []})
    env = records[0]["env"] if records else {}
    return {"env": {name: env.get(name) for name in ("torch", "transformers", "cpu", "git_commit")}, "rows": rows}


def command_of(record: dict[str, Any]) -> str:
    """The command line that measures the press of a record alone, with what its settings say."""
    settings = record["settings"]
    is_task = record["protocol"].startswith("tasks")
    parts = ["coldpress", "tasks" if is_task else "speed" if settings.get("speed_only") else "ppl"]
    from_options = (
        "model",
        "dataset",
        "subset",
        "task",
        "task_tokens",
        "task_examples",
        "max_documents",
        "max_windows",
    )
    from_options += ("context_tokens", "target_tokens", "stride", "batch_size")
    if settings.get("speed_only"):
        from_options = ("model", "dataset", "subset", "context_limit", "max_new_tokens", "repetitions", "warmup")
    else:
        parts += [] if is_task else ["--ppl_apply_press", "--ppl_only"]
    for name in from_options:
        value = settings.get(name)
        if value is not None:
            parts += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    parts += ["--press", record["press"]]
    if record["compression_ratio"]:
        parts += ["--compression_ratio", str(record["compression_ratio"])]
    return shlex.join(parts)


def boards(rows: list[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The rows of each model and ratio: one a press, best first; ratio 0 stands for presses without a ratio.

    Presses that removed nothing of any text come last; their ``rank`` and its interval are None.
    """
    scored: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["protocol"].startswith("prefix") and row.get("per_window"):
            at = row["model"], row.get("compression_ratio") or 0.0
            scored.setdefault(at, {}).setdefault(row["press"], []).append(row)
    others = {(row["model"], row["press"]): [] for row in rows}
    for row in rows:
        others[row["model"], row["press"]].append(row)
    order = sorted(scored, key=lambda at: (at[0] != "smollm2", at[0], at[1]))
    return {at: _board(scored[at], lambda press, model=at[0]: others[model, press]) for at in order}


def windows_of(rows: list[dict[str, Any]], model: str) -> dict[float, dict[str, dict[tuple[str, int, int], float]]]:
    """By ratio and press of a model the KL of each window."""
    found: dict[float, dict[str, dict[tuple[str, int, int], float]]] = {}
    for row in rows:
        if row["model"] == model and row["protocol"].startswith("prefix"):
            own = found.setdefault(row.get("compression_ratio") or 0.0, {}).setdefault(row["press"], {})
            own.update({_place(row, window): window[2] for window in row.get("per_window") or ()})
    return found


def _board(by_press: dict[str, list[dict[str, Any]]], others: Any) -> list[dict[str, Any]]:
    whole = {press for press, rows in by_press.items() if all(r["kv_bytes"] >= r["kv_bytes_baseline"] for r in rows)}
    names = sorted(by_press, key=lambda press: (press in whole, press))
    windows = {press: {_place(row, w): w[2] for row in by_press[press] for w in row["per_window"]} for press in names}
    places = sorted({place for own in windows.values() for place in own})
    kld = np.array([[windows[press].get(place, np.nan) for place in places] for press in names])
    texts = np.array([place[0] for place in places])
    ranks, low, high = ranking(kld[: len(names) - len(whole)], texts)
    found = []
    for i, press in enumerate(names):
        of_texts = {_text(row): row for row in by_press[press]}
        beside = others(press)
        speed = next((row for row in beside if row["protocol"] == "speed" and row.get("ttft_s")), {})
        scores = [task["score"] for row in beside for task in row.get("tasks", ()) if task["score"] is not None]
        found.append(
            {
                "press": press,
                "rank": None if press in whole else int(ranks[i]),
                "rank_ci95": None if press in whole else [int(low[i]), int(high[i])],
                "kld": float(np.nanmean(kld[i])),
                "windows": int((~np.isnan(kld[i])).sum()),
                "texts": of_texts,
                "bytes": _mean([row["kv_bytes"] / row["kv_bytes_baseline"] for row in of_texts.values()]),
                "same_top1": _mean([row["same_top1"] for row in of_texts.values()]),
                "score": _mean(scores) if scores else None,
                "ttft_s": speed.get("ttft_s"),
                "tpot_ms": speed.get("tpot_ms"),
            }
        )
    return sorted(found, key=lambda row: (row["rank"] is None, row["rank"] or 0, row["kld"]))


def ranking(kld: np.ndarray, texts: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rank of each press (1 = smallest KL), and the ends of its 95 % interval over resampled windows.

    Two presses are compared on the windows that both were measured on, so that one with fewer windows is not helped by
    easy ones; its rank is 1 and the number of presses that are better than it there. Windows are drawn with
    replacement, as many of each text as it has.

    Args:
        kld: ``[presses, windows]``, NaN where a press was not measured.
        texts: ``[windows]``, the text of each window.
    """
    has = ~np.isnan(kld)
    filled, mask = np.where(has, kld, 0.0), has.astype(float)
    draw = np.random.default_rng(seed)
    groups = [np.flatnonzero(texts == text) for text in np.unique(texts)]

    def ranks(weights: np.ndarray) -> np.ndarray:
        mine = (filled * weights) @ mask.T  # [p, q]: sum of p's KL over the windows that both have
        return 1 + (mine > mine.T).sum(axis=1)

    resampled = []
    for _ in range(N_RESAMPLES):
        weights = np.zeros(kld.shape[1])
        for group in groups:
            np.add.at(weights, draw.choice(group, len(group)), 1.0)
        resampled.append(ranks(weights))
    low, high = np.quantile(np.array(resampled), [0.025, 0.975], axis=0, method="nearest")
    return ranks(np.ones(kld.shape[1])), low, high


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _text(row: dict[str, Any]) -> str:
    return row.get("subset") or row["dataset"].rstrip("/").rpartition("/")[2]


def _place(row: dict[str, Any], window: list[Any]) -> tuple[str, int, int]:
    return _text(row), window[0], window[1]
