"""The words of a brief report and of an opening, in English and in Chinese: three sentences for an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from coldpress.backends import NO_PRESS
from coldpress.records.metrics import FEWEST_QUESTIONS
from coldpress.records.reading import noise_of, unanswered
from coldpress.records.wording import (
    capital,
    clean,
    memory_words,
    number,
    percent,
    short_bytes,
    three_digits,
)
from coldpress.report.glance import CHEAP, FEWEST_WINDOWS, Answer, Row, answer, kl_of
from coldpress.report.sections import SAME, Entry, Section

_MEMORY = {
    "cuda_allocated": "设备上的张量",
    "vmhwm": "进程的常驻内存，含模型（Linux 的 VmHWM）",
    "rss_polled": "进程的常驻内存，含模型，每 2 毫秒采样一次",
    "maxrss_process": "进程启动以来的常驻内存",
}
WORDS: dict[str, dict[str, str]] = {
    "en": {
        "and": " and ",
        "comma": ", ",
        "brackets": " ({})",
        "at_ratio": "with {size} of the cache removed",
        "at_size": "with a budget of {size}",
        "at_none": "at its own size",
        "best": "{at}, {press} stays closest to the uncompressed model{numbers}; the cache shrinks from {before} to "
        "{after}.",
        "level": "{at}, {press} stays closest to the uncompressed model{numbers}, though {others} cannot be told from "
        "it; the cache shrinks from {before} to {after}.",
        "more": "{n} others",
        "cheap": "The smallest cache that surely stays within +{cheap} % of PPL is {press} {at} ({after} of {before}).",
        "not_cheap": "No press is shown to stay within +{cheap} % of PPL.",
        "few": "Too few windows ({n}) to say which press is better or what it costs; score at least {least}.",
        "not_compared": "No press was compared with the uncompressed cache.",
        "shrinks": "{at}, the smallest cache measured, the KV cache takes {after} of {before}.",
        "plain": "The uncompressed model has PPL {ppl}; under this protocol no press touches the loss, so it says "
        "nothing about their quality.",
        "stream": "Read as a stream {at}, {press} has the lowest PPL ({ppl}).",
        "stream_few": "Read as a stream {at}, too few texts ({n}) to say which press is better.",
        "counts": "Beside the uncompressed cache, of {n} {scores} (a press, a size and a task each) {parts}.",
        "worse": "{n} {are} below it",
        "same": "{n} {are} within the error bars of it",
        "better": "{n} {are} above it",
        "few_questions": "{n} {have} too few questions ({few}; at least {least} are needed)",
        "unknown": "{n} {have} no error bars",
        "unanswered": "The uncompressed model scores 0 on {names}, which says nothing about a press.",
        "faster": "With {context} tokens of context, {press} {at} decodes {times} times as fast, in every one of {n} "
        "rounds faster than the uncompressed cache.",
        "not_faster": "With {context} tokens of context, no press decodes faster than the uncompressed cache in every "
        "round.",
        "once": "Decoding was timed in one round only, too few to call a press faster.",
        "not_timed": "Speed was not measured.",
        "title": "KV-cache compression: brief report",
        "models": "Models",
        "data": "Data",
        "methods": "Methods",
        "results": "Results",
        "conclusion": "Conclusion",
        "commands": "Commands",
        "machine": "Machine",
        "model": "{name}: {n} M parameters, {dtype}, {device}, attention {attention}",
        "text": "{name}: {n} tokens, sha256 {sha}",
        "no_press": "no_press: the uncompressed cache, which all presses are compared with. It is measured beside "
        "every press, also where one press only was asked for.",
        "prefix": "Quality ({protocol}): {context} tokens of context are read and compressed; the loss is that of the "
        "next {target} tokens, the same ones for every press. ",
        "windows": "{n} windows.",
        "one_window": "{n} window.",
        "to": "{least} to {most}",
        "own": "{name}: a press of its user's file {file}, sha256 {sha}.",
        "interrupted": "interrupted",
        "unfinished": "Failed or interrupted before any result: {names}.",
        "strided": "PPL ({protocol}): that of the uncompressed model over the whole text; no press touches it.",
        "other": "Protocol {protocol}.",
        "timing": "Speed: {context} tokens of context, then {n} generated tokens, {rounds} rounds; each round times "
        "the uncompressed cache too.",
        "KL": "KL: mean divergence of the next-token distribution from the uncompressed model's, in nats; smaller is "
        "better.",
        "PPL": "PPL: exp of the loss.",
        "±": "±: half the paired 95 % interval over windows.",
        "tok/s": "tok/s: decoding.",
        "peak": "Peak memory is {kind}.",
        "left_out": "The best presses of each size; {n} of {of} rows. All: `coldpress report`.",
        "sizes": "KV cache: of {context} tokens of context.",
        "timed": "tok/s and peak memory: with {context} tokens of context.",
        "noisy": "Rounds of the uncompressed cache took from {} to {} ms a token: the machine was not quiet, and times "
        "say nothing.",
        "versions": "{newer} ran {names}, {older} the others; the uncompressed cache has the same loss under both, to "
        "{same} nats a token in each window or task.",
        "heads": "press|removed|KV cache|KL|PPL|change of PPL|score|first token|tok/s|peak memory|status",
    },
    "zh": {
        "and": "、",
        "comma": "，",
        "brackets": "（{}）",
        "at_ratio": "删去 {size} 的缓存时",
        "at_size": "预算为 {size} 时",
        "at_none": "按其自身大小",
        "best": "{at}，{press} 最接近未压缩模型{numbers}；缓存从 {before} 降到 {after}。",
        "level": "{at}，{press} 最接近未压缩模型{numbers}，但与 {others} 无法区分；缓存从 {before} 降到 {after}。",
        "more": "另外 {n} 个",
        "cheap": "{at}，{press} 是困惑度增幅确定不超过 {cheap} % 的最小缓存（{before} 中的 {after}）。",
        "not_cheap": "没有方法被证明困惑度增幅不超过 {cheap} %。",
        "few": "窗口太少（{n} 个），无法判断哪个方法更好、代价多大；至少需要 {least} 个。",
        "not_compared": "没有方法与未压缩缓存作过比较。",
        "shrinks": "{at}缓存最小：{before} 中的 {after}。",
        "plain": "未压缩模型的困惑度为 {ppl}；此协议下压缩方法不影响损失，因此它不说明方法的质量。",
        "stream": "流式读取，{at}，{press} 的困惑度最低（{ppl}）。",
        "stream_few": "流式读取，{at}，文本太少（{n} 个），无法判断哪个方法更好。",
        "counts": "与未压缩缓存相比，共 {n} 个分数（每个方法、大小与任务各一）：{parts}。",
        "worse": "{n} 个低于它",
        "same": "{n} 个在其误差范围内",
        "better": "{n} 个高于它",
        "few_questions": "{n} 个的问题太少（{few} 个；至少需要 {least} 个）",
        "unknown": "{n} 个没有误差范围",
        "unanswered": "未压缩模型在 {names} 上得 0 分，这不说明方法的好坏。",
        "faster": "上下文为 {context} 个词元，{at}，{press} 的解码速度是未压缩缓存的 {times} 倍，{n} 轮中每一轮都更"
        "快。",
        "not_faster": "上下文为 {context} 个词元时，没有方法在每一轮中都比未压缩缓存解码更快。",
        "once": "解码只计时了一轮，不足以判断是否更快。",
        "not_timed": "没有测量速度。",
        "title": "KV 缓存压缩：简要报告",
        "models": "模型",
        "data": "数据",
        "methods": "方法",
        "results": "结果",
        "conclusion": "结论",
        "commands": "命令",
        "machine": "机器",
        "model": "{name}：{n} M 参数，{dtype}，{device}，注意力 {attention}",
        "text": "{name}：{n} 个词元，sha256 {sha}",
        "no_press": "no_press：未压缩的缓存，一切方法都与它比较。即使只要求一个方法，它也一同测量。",
        "prefix": "质量（{protocol}）：读入并压缩 {context} 个词元的上下文，损失取其后 {target} 个词元，各方法相同。",
        "windows": "{n} 个窗口。",
        "one_window": "{n} 个窗口。",
        "to": "{least} 至 {most}",
        "own": "{name}：使用者自己的文件 {file} 中的方法，sha256 {sha}。",
        "interrupted": "中断",
        "unfinished": "在得到任何结果之前失败或中断：{names}。",
        "strided": "困惑度（{protocol}）：未压缩模型在全文上的困惑度，压缩方法不影响它。",
        "other": "协议 {protocol}。",
        "timing": "速度：{context} 个词元的上下文，再生成 {n} 个词元，{rounds} 轮；每一轮也给未压缩缓存计时。",
        "KL": "KL：下一词元分布相对未压缩模型的平均散度，单位 nat，越小越好。",
        "PPL": "PPL：困惑度，即损失的指数。",
        "±": "±：按窗口配对的 95 % 区间的一半。",
        "tok/s": "tok/s：解码速度。",
        "peak": "峰值内存：{kind}。",
        "left_out": "每个大小只列最好的方法；{of} 行中的 {n} 行。全部见 `coldpress report`。",
        "sizes": "KV 缓存：{context} 个词元的上下文。",
        "timed": "tok/s 与峰值内存：{context} 个词元的上下文。",
        "noisy": "未压缩缓存的各轮每个词元用时 {} 到 {} ms：机器并不空闲，这些时间说明不了什么。",
        "versions": "在 {newer} 下测量的是 {names}，其余在 {older} 下；"
        "在每个窗口或任务中，两者的未压缩缓存损失相同，每词元相差不超过 {same} nat。",
        "heads": "方法|删去|KV 缓存|KL|PPL|PPL 变化|分数|首词元|tok/s|峰值内存|状态",
    },
}


def memory(kind: str, language: str) -> str:
    """What a peak of memory is of."""
    return _MEMORY.get(kind, kind) if language == "zh" else memory_words(kind)


def headed(found: Sequence[Row], language: str = "en") -> list[list[str]]:
    """Heads and cells of the opening table, without the columns that no row fills: eight at most beside the status."""
    heads, rows = filled(found, language)
    return [heads, *([text for text, _ in row] for row in rows)]


def filled(
    found: Sequence[Row], language: str = "en", spells: bool = True
) -> tuple[list[str], list[list[tuple[str, float | None]]]]:
    """Heads of the opening table, and of each row what is shown and the number behind it.

    ``spells``: intervals are written after their numbers.
    """
    heads = WORDS[language]["heads"].split("|")
    lines: list[list[tuple[str, float | None]]] = [
        [
            (clean(row.press), None),
            (removed_words(row.size), row.asked),
            (short_bytes(row.kv_bytes), row.kv_bytes),
            ("" if row.kl is None else number(row.kl, 3), row.kl),
            ("" if row.ppl is None else f"{row.ppl:.2f}" if row.ppl < 1e4 else f"{row.ppl:.3g}", row.ppl),
            (_change(row, spells), row.change),
            ("" if row.score is None else f"{row.score:.2f}", row.score),
            ("" if row.ttft_s is None else f"{row.ttft_s:.3g} s", row.ttft_s),
            ("" if row.tokens_per_s is None else three_digits(row.tokens_per_s), row.tokens_per_s),
            (short_bytes(row.peak_bytes), row.peak_bytes),
            (row.status, None),
        ]
        for row in found
    ]
    used = [i for i in range(len(heads)) if i < 2 or any(line[i][0] for line in lines)]
    return [heads[i] for i in used], [[line[i] for i in used] for line in lines]


def removed_words(size: str) -> str:
    return f"{100 * float(size):.12g} %" if re.fullmatch(r"[\d.]+", size) else size


def _change(row: Row, spells: bool) -> str:
    if row.change is None or (row.press == NO_PRESS and not row.size):
        return ""
    if row.change > 9:
        return f"×{1 + row.change:.3g}"
    half = None if row.change_ci is None or not spells else (row.change_ci[1] - row.change_ci[0]) / 2
    return percent(row.change) + ("" if half is None else f" ± {100 * half:.1f}")


def contexts(section: Section, language: str = "en") -> list[str]:
    """Of how many tokens the sizes and the timings of the opening table are, and whether the timings say something."""
    sized = {n for p in section.entries if (n := p.context_tokens) is not None and section.kind != "speed"}
    timed = answer(section).context
    words, said = WORDS[language], list[str]()
    if len(sized) == 1 and section.kind != "plain":
        said.append(words["sizes"].format(context=f"{next(iter(sized)):,}"))
    if timed is not None:
        said.append(words["timed"].format(context=f"{timed:,}"))
    noise = noise_of((p.timed or p).record for p in section.all)
    return said + ([] if noise is None else [words["noisy"].format(*(f"{end:.2f}" for end in noise))])


def _joined(names: Sequence[str], words: dict[str, str]) -> str:
    """``a, b and c``."""
    return words["and"].join(part for part in (words["comma"].join(names[:-1]), *names[-1:]) if part)


def versions(found: Iterable[Section], language: str = "en") -> list[str]:
    """Which presses other versions measured than the rest; a sentence for each."""
    words, said = WORDS[language], list[str]()
    for section in found:
        (first, _), *more = section.by_version().items()
        for own, labels in more:
            newer, older = (
                clean(words["and"].join(name for name in ours if name not in other))
                for ours, other in ((own, first), (first, own))
            )
            names = _joined([clean(label) for label in labels], words)
            said.append(capital(words["versions"].format(newer=newer, older=older, same=f"{SAME:g}", names=names)))
    return [*dict.fromkeys(said)]


def _at(entry: Entry, words: dict[str, str]) -> str:
    ratio = entry.record.get("compression_ratio")
    if entry.record.get("budget_tokens") is not None or entry.record.get("budget_bytes") is not None:
        return words["at_size"].format(size=entry.size)
    return words["at_ratio"].format(size=f"{100 * ratio:.12g} %") if ratio else words["at_none"]


def sentences(found: Answer, language: str = "en") -> list[str]:
    """Quality, memory and speed: at most three sentences."""
    words = WORDS[language]
    said = [*_quality(found, words), *_speed(found, words)]
    return [capital(sentence) for sentence in said]


def _quality(found: Answer, words: dict[str, str]) -> list[str]:
    def of(key: str, entry: Entry, **more: Any) -> str:
        before, after = entry.kv_bytes_baseline, entry.kv_bytes
        sizes = {"before": short_bytes(before), "after": short_bytes(after)} if before and after else {}
        return words[key].format(press=clean(entry.label), at=_at(entry, words), **sizes, **more)

    kind, least, said = found.section.kind, found.smallest, list[str]()
    shrinks = [of("shrinks", least)] if least is not None else []
    if kind == "tasks":
        return [*_counts(found, words), *shrinks]
    if kind == "stream" and found.best is not None:
        at = _at(found.best, words)
        few = words["stream_few"].format(at=at, n=found.few)
        return [few if found.few else of("stream", found.best, ppl=f"{found.best.ppl:.2f}")]
    if kind == "plain":
        plain = [words["plain"].format(ppl=f"{found.uncompressed:.2f}")] if found.uncompressed is not None else []
        return [*plain, *shrinks]
    if kind == "speed":
        return shrinks
    if found.few is not None:
        return [words["few"].format(n=found.few, least=FEWEST_WINDOWS), *shrinks]
    best = found.best
    if best is None or not (best.kv_bytes and best.kv_bytes_baseline):
        return [words["not_compared"], *shrinks]
    kl, change = kl_of(best), best.ppl_change
    numbers = [f"KL {number(kl, 3)}"] if kl is not None else []
    numbers += [f"PPL {percent(change)}"] if change is not None else []
    others = [clean(name) for name in found.level[: 4 if len(found.level) < 5 else 3]]
    others += [words["more"].format(n=len(found.level) - 3)] if len(found.level) > 4 else []
    joined = _joined(others, words)
    inside = words["comma"].join(numbers)
    said.append(
        of(
            "level" if others else "best",
            best,
            numbers=words["brackets"].format(inside) if numbers else "",
            others=joined,
        )
    )
    cheap = {"cheap": f"{100 * CHEAP:g}"}
    said.append(words["not_cheap"].format(**cheap) if found.cheap is None else of("cheap", found.cheap, **cheap))
    return said


def _counts(found: Answer, words: dict[str, str]) -> list[str]:
    counts, few = found.counts, {"few": found.few, "least": FEWEST_QUESTIONS}
    kinds = [kind for kind in ("worse", "same", "better", "few_questions", "unknown") if kind in counts]
    one, many = {"are": "is", "have": "has"}, {"are": "are", "have": "have"}
    parts = [words[kind].format(n=counts[kind], **few, **(one if counts[kind] == 1 else many)) for kind in kinds]
    n = sum(counts.values())
    said = words["counts"].format(n=n, scores="score" if n == 1 else "scores", parts=words["comma"].join(parts))
    zero = unanswered(p.record for p in found.section.entries)
    more = [words["unanswered"].format(names=_joined(zero, words))] if zero else []
    return [said, *more] if parts else more


def _speed(found: Answer, words: dict[str, str]) -> list[str]:
    if not found.n_rounds:
        return [words["not_timed"]]
    if found.n_rounds == 1:
        return [words["once"]]
    context = f"{found.context:,}" if found.context else "?"
    if found.fastest is None:
        return [words["not_faster"].format(context=context)]
    best = found.fastest
    named = {"press": clean(best.label), "at": _at(best, words), "times": f"{best.decode_speedup:.2f}"}
    return [words["faster"].format(context=context, n=found.n_rounds, **named)]
