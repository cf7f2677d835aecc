"""What every test gets: one thread, property tests that repeat exactly, and artefacts for presses that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from tests.presses.made_up import made_up
from tests.presses.weights import given_weights as given_weights

from coldpress.learned.calibrated import Calibrated

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
settings.register_profile("coldpress", deadline=None, derandomize=True, database=None)
settings.load_profile("coldpress")

MISSING = Calibrated.missing


@pytest.fixture(scope="session", autouse=True)
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own artefacts; where there are none, calibrated presses get made-up ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path_factory.mktemp("artefacts")))
        patch.setattr(Calibrated, "missing", made_up)
        yield


@pytest.fixture
def no_made_up_artefacts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presses say that an artefact is missing, as they do outside the tests."""
    monkeypatch.setattr(Calibrated, "missing", MISSING)
