"""The catalogue says what the classes say, and what it says can be run."""

from __future__ import annotations

from dataclasses import fields

import pytest

import coldpress
from coldpress import AdaKVPress, SnapKVPress, ThinKPress, make_press
from coldpress.bases.docstring import parse
from coldpress.bases.listing import entry, listing, python_only, traits
from coldpress.bases.registry import catalogue, find_press, press_classes
from coldpress.errors import PressError


class Made:
    """Keep nothing much.

    score = 1 / :meth:`there`,
    in float32. Source: Nobody 1999, arXiv:1234.56789, section 2. Differs from the paper: a sum; no
    product. Differs from kvpress: nothing.

    Needs: keys. Cost: O(T)
    per layer.

    Args:
        a, b: two
            numbers: any.
        c: one.

    Raises:
        PressError: never.
    """


def test_a_docstring_has_parts() -> None:
    doc = parse(Made)
    assert doc.summary == "Keep nothing much."
    assert doc.details == ("score = 1 / ``there``, in float32.",)
    assert doc.source == "Nobody 1999, arXiv:1234.56789, section 2"
    assert doc.differs == ("Differs from the paper: a sum; no product.", "Differs from kvpress: nothing.")
    assert (doc.needs, doc.cost) == ("keys", "O(T) per layer")
    assert doc.arguments == {"a": "two numbers: any.", "b": "two numbers: any.", "c": "one."}


@pytest.mark.parametrize("info", catalogue(), ids=lambda info: info.name)
def test_the_call_makes_the_press_of_the_name(info: coldpress.bases.registry.PressInfo) -> None:
    ratio = 0.5 if info.has_ratio else 0.0
    made = eval(info.call, {**vars(coldpress.public), "compression_ratio": ratio})
    assert made == make_press(info.name, ratio)


def test_name_and_ratio_may_be_given_by_name() -> None:
    expected = make_press("snapkv", 0.5, window_size=8)
    assert make_press("snapkv", compression_ratio=0.5, window_size=8) == expected
    assert make_press(name="snapkv", window_size=8, compression_ratio=0.5) == expected
    with pytest.raises(TypeError, match="compression_ratio"):
        make_press("snapkv")  # type: ignore[call-arg]
    with pytest.raises(PressError, match="no parameter 'compression_ratio'"):
        make_press("snapkv", 0.5, compression_ratio=0.5)


@pytest.mark.parametrize("info", press_classes(), ids=lambda info: info.class_name)
def test_every_class_is_described_whole(info: coldpress.bases.registry.PressInfo) -> None:
    assert info.summary and info.source and info.needs and info.cost
    cls = getattr(coldpress, info.class_name)
    taken = {f.name for f in fields(cls) if f.init} - {"budget_tokens", "budget_bytes"}
    assert {p.name for p in info.parameters} == taken
    silent = {p.name for p in info.parameters if not p.text}
    assert silent <= {"compression_ratio"}, f"{info.class_name} says nothing of {silent}"
    assert set(parse(cls).arguments) <= taken, "its docstring explains what it does not take"
    assert info.source in " ".join(entry(info).split())


def test_classes_without_a_name_are_found() -> None:
    assert [info.class_name for info in python_only()] == [
        "BoundaryPress",
        "CAMPress",
        "ComposedPress",
        "DMSPress",
        "DecodingPress",
        "FairPress",
        "KeyformerPress",
        "MassCAMPress",
        "PerLayerCompressionPress",
        "PrefillDecodingPress",
        "QuestPress",
        "RaaSPress",
        "ScissorhandsPress",
        "SparQPress",
    ]


def test_a_name_may_change_parameters_of_the_wrapper() -> None:
    assert make_press("snap_think", 0.5) == ThinKPress(0.4, press=SnapKVPress(0.5))
    assert make_press("snap_think", 0.5, kernel_size=3, key_channel_compression_ratio=0.1) == ThinKPress(
        0.1, press=SnapKVPress(0.5, kernel_size=3)
    )
    assert make_press("adakv_snapkv", 0.5, alpha_safeguard=0.5) == AdaKVPress(SnapKVPress(0.5), alpha_safeguard=0.5)
    assert find_press("think").call == "ThinKPress(key_channel_compression_ratio=0.4, window_size=32)"


def test_an_unknown_press_is_not_found() -> None:
    with pytest.raises(PressError, match=r"Unknown press 'SnapKVPres'. Did you mean 'SnapKVPress'"):
        find_press("SnapKVPres")


@pytest.mark.parametrize("info", press_classes(), ids=lambda info: info.class_name)
def test_who_is_said_to_have_a_ratio_takes_one_and_a_budget(info: coldpress.bases.registry.PressInfo) -> None:
    taken = {f.name for f in fields(getattr(coldpress, info.class_name)) if f.init}
    says_so = "has a compression ratio" in traits(info)
    assert says_so == ({"compression_ratio", "budget_tokens", "budget_bytes"} <= taken)


def test_whose_ratio_it_is() -> None:
    for name, said in {
        "AdaKVPress": "its ratio is that of the press inside",
        "ComposedPress": "its ratio is that of the presses inside",
        "ThinKPress": "its ratio is that of the press inside",
        "think": "no ratio: its own parameters say how much is kept",
        "snap_think": "has a compression ratio",
        "PerLayerCompressionPress": "has a ratio for each layer, and takes no budget",
        "CompressionRatioDecodingPress": "has a ratio, of the text so far, and takes no budget",
        "decoding_tova": "has a ratio, of the text so far, and takes no budget",
        "DecodingPress": "no ratio: its own parameters say how much is kept",
    }.items():
        assert traits(find_press(name))[0] == said


def test_dms_is_marked_as_a_press_that_may_go_on() -> None:
    info = find_press("DMSPress")
    assert info.can_rechoose and traits(info)[1] == "with decoding=True works while decoding"


def test_rows_of_presses_that_work_while_decoding_name_their_scorer() -> None:
    rows = " ".join(listing().split())
    for info in catalogue():
        if info.name.startswith("decoding_"):
            row = rows.partition(f" {info.name} ")[2]
            scorer = info.title.rstrip(")").rpartition("(")[2]
            assert row.partition(f", by {scorer}")[0].count(" by ") == 0 and f", by {scorer}" in row, info.name
