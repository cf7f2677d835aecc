"""Quality: the largest ratio at which a layer misses little, by loops; thresholds that keep what they promise."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contract.architectures import tiny, tokens
from tests.examples.contract import CHECKS, Case, every_check
from tests.presses.views import MODELS, view_of

from coldpress import AdaKVPress, DefensiveKVPress, KnormPress, QualityPress, SnapKVPress
from coldpress.errors import PressError
from coldpress.io.artefacts import Artefact
from coldpress.learned.calibration import calibrate
from coldpress.presses.quality import LEVELS, safe_threshold

RATIOS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("threshold", [0.02, 0.2, 0.5])
def test_each_row_takes_the_largest_ratio_that_misses_little(model: str, threshold: float) -> None:
    view = view_of(model)
    kept = QualityPress(SnapKVPress(window_size=4), n_queries=8, threshold=threshold).compress(view)
    attention, ratios = view.window_attention(8), []
    for row in range(2):
        expected = [list(range(view.n_tokens))] * view.keys.shape[1]
        for ratio in RATIOS:
            chosen = SnapKVPress(ratio, 4).choose(view)
            assert chosen is not None
            missed = 0.0
            for head in range(view.keys.shape[1]):
                on_kept = sum(float(attention[row, head, :, :, t].sum()) for t in chosen[row, head].tolist())
                missed += 1 - on_kept / float(attention[row, head].sum())
            if missed / view.keys.shape[1] <= threshold:
                expected = [head.tolist() for head in chosen[row]]
                ratios.append(ratio)
                break
        for head, mine in enumerate(expected):
            own = range(view.n_tokens) if kept is None else kept.positions[row, head].tolist()
            assert [t for t in own if t >= 0] == mine
    assert threshold < 0.3 or ratios


def test_nothing_may_be_missed_and_everything() -> None:
    view = view_of("llama")
    assert QualityPress(SnapKVPress(window_size=4), threshold=0.0).compress(view) is None
    kept = QualityPress(SnapKVPress(window_size=4), threshold=1.0).compress(view)
    plain = SnapKVPress(0.95, 4).compress(view)
    assert kept is not None and plain is not None and torch.equal(kept.positions, plain.positions)


def test_a_safe_threshold_by_hand() -> None:
    losses = [[0.0, 0.01, 0.03], [0.0, 0.03, 0.01], [0.01, 0.01, 0.01], [0.05, 0.0, 0.0]]
    # safe up to: 2, 1 (what comes after an unsafe one does not count), 3, 0
    assert [safe_threshold(losses, 0.02, risk) for risk in (0.2, 0.4, 0.5)] == [0, 1, 1]
    assert safe_threshold(losses, 0.1, 0.2) == 3
    with pytest.raises(PressError, match="needs at least 19 samples, and there are 4"):
        safe_threshold(losses, 0.02, 0.05)
    assert safe_threshold(losses * 5, 0.02, 0.05) == 0


def test_the_risk_holds_for_samples_like_those_that_were_seen() -> None:
    """200 trials of 50 samples and one more: at a risk of 0.1 no more than some 0.1 of them exceed."""
    rng, exceeded = random.Random(0), 0

    def sample() -> list[float]:
        hard = rng.lognormvariate(0, 1)
        return [0.004 * hard * 1.5**i * rng.lognormvariate(0, 0.2) for i in range(8)]

    for _ in range(400):
        n = safe_threshold([sample() for _ in range(50)], 0.02, 0.1)
        exceeded += n > 0 and sample()[n - 1] > 0.02
    assert exceeded <= 56  # 40 are expected at most; 56 is exceeded in one of 200 such tests


SAMPLES = [tokens(1, 64, seed=i)[0] for i in range(5)]


def test_calibrated_on_what_follows_each_sample(tmp_path: Path) -> None:
    """KL by hand, of a cache that is compressed by itself, at the threshold that came out."""
    press = QualityPress(SnapKVPress(window_size=8), risk=0.4, n_queries=8)
    model = tiny("llama")
    found = calibrate(press, model, SAMPLES)["thresholds"]
    assert found.shape == (2, len(LEVELS)) and torch.equal(found[0], found[1])
    assert bool((found[0, 1:] >= found[0, :-1]).all())  # more may be missed where more may be lost
    file = tmp_path / "thresholds.safetensors"
    Artefact("quality", {"thresholds": found}).save(file)
    level = next(i for i in range(len(LEVELS)) if found[0, i] > 0 or i == len(LEVELS) - 1)
    own = QualityPress(press.press, LEVELS[level], 0.4, 8, thresholds=file)
    given = QualityPress(press.press, LEVELS[level], 0.4, 8, threshold=float(found[0, level]))
    view = view_of("llama")
    first, second = own.compress(view), given.compress(view)
    assert (first is None) == (second is None)
    if first is not None and second is not None:
        assert torch.equal(first.positions, second.positions)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QualityPress(SnapKVPress(0.5)), "ratio"),
        (lambda: QualityPress(SnapKVPress(), max_kl=0.0), "max_kl must"),
        (lambda: QualityPress(SnapKVPress(), risk=0.0), "risk must be above 0"),
        (lambda: QualityPress(SnapKVPress(), risk=0.7), "risk must"),
        (lambda: QualityPress(SnapKVPress(), threshold=1.5), "threshold must"),
        (lambda: QualityPress("snapkv"), "wraps a press"),
        (lambda: calibrate(QualityPress(KnormPress()), tiny("llama"), SAMPLES), "needs at least 19 samples"),
        (lambda: calibrate(QualityPress(KnormPress()), tiny("llama"), [tokens(1, 2)[0]]), "at least 3 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(PressError, match=message):
        make()


def test_where_nothing_is_safe_it_is_said(tmp_path: Path) -> None:
    press = QualityPress(SnapKVPress(window_size=8), risk=0.4)
    calibration = press.calibration()
    calibration.losses, calibration.n_layers = [[1.0] * 10] * 5, 2  # type: ignore[attr-defined]
    with pytest.warns(UserWarning, match=r"No threshold is safe for max_kl of 0\.001, .*0\.2"):
        found = calibration.tensors()
    assert not found["thresholds"].any()
    file = tmp_path / "none.safetensors"
    Artefact("quality", found).save(file)
    with pytest.warns(UserWarning, match="QualityPress keeps everything"):
        ready = QualityPress(press.press, thresholds=file).prepared(tiny("llama"))
    assert ready.compress(view_of("llama")) is None


@pytest.mark.parametrize("given", ["parameter", "name"])
def test_thresholds_of_another_press_or_risk_are_refused(given: str, tmp_path: Path) -> None:
    made, file = QualityPress(DefensiveKVPress(), risk=0.4), tmp_path / "thresholds.safetensors"
    Artefact("quality", {"thresholds": torch.full((2, 8), 0.2)}, {"variant": made.variant()}).save(file)
    replace(made, thresholds=file).prepared(tiny("llama"))
    with pytest.raises(PressError, match=r"risk 0\.4, and this one has .*--press_args '{\"risk\": 0.3}'"):
        replace(made, risk=0.3, thresholds=file).prepared(tiny("llama"))
    with pytest.raises(PressError, match="this one has KnormPress"):
        replace(made, press=KnormPress(), thresholds=file).prepared(tiny("llama"))


def test_missing_thresholds_name_the_command_that_makes_them() -> None:
    with pytest.raises(PressError, match=r"calibrate quality --model MODEL .* --press_args '{\"risk\": 0.02}'"):
        QualityPress(DefensiveKVPress(), risk=0.02, max_kl=0.1).prepared(tiny("llama"))
    with pytest.raises(PressError, match=r"calibrate\(press, model, samples\).* around SnapKVPress"):
        QualityPress(SnapKVPress()).prepared(tiny("llama"))


def test_what_must_stay_fits_into_no_ratio_so_everything_is_kept() -> None:
    view = view_of("llama")
    pinned = (torch.arange(view.n_tokens) < view.n_tokens - 1).expand(view.keys.shape[:3])
    assert (
        QualityPress(SnapKVPress(window_size=8), threshold=1.0).compress(replace(view, columns={"pinned": pinned}))
        is None
    )
    with pytest.raises(PressError, match="NaN"):  # what is no matter of room is said
        QualityPress(KnormPress(), threshold=1.0).compress(replace(view, keys=view.keys * torch.nan, _memo={}))


CASES = {
    "snapkv": Case(QualityPress(SnapKVPress(window_size=8), threshold=0.3), lacks=("chunks", "rerotated", "ragged")),
    "defensive": Case(
        QualityPress(DefensiveKVPress(window_size=8, first_stage_mass=0.3), threshold=0.6),
        lacks=("chunks", "rerotated"),
    ),
    "adakv": Case(
        QualityPress(AdaKVPress(SnapKVPress(window_size=8)), threshold=0.3),
        model="gpt_neox",
        lacks=("chunks", "rerotated"),
    ),
}


@every_check(CASES)
def test_the_contract(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](CASES[name], tmp_path)
