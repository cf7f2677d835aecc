"""What every test gets: one thread, property tests that repeat exactly, and none of the user's own artefacts."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from tests.presses.made_up import given_artefacts as given_artefacts
from tests.presses.weights import given_weights as given_weights

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
settings.register_profile("coldpress", deadline=None, derandomize=True, database=None)
settings.load_profile("coldpress")


@pytest.hookimpl(tryfirst=True)  # before slow tests are deselected
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Make slow all but every n-th case of a test that is marked ``thinned(n)``; ``make test-slow`` runs the others."""
    seen: Counter[tuple[str, str]] = Counter()
    for item in items:
        mark = item.get_closest_marker("thinned")
        if mark is not None and item.get_closest_marker("slow") is None:
            test = item.nodeid.partition("[")[0], item.name.partition("[")[0]
            if seen[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[test] += 1


def pytest_collection_finish() -> None:
    """Thousands of collected tests stay until the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_artefacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own artefacts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLDPRESS_ARTEFACTS", str(tmp_path_factory.mktemp("artefacts")))
        yield
