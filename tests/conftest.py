"""What every test gets: one thread, and property tests that repeat exactly."""

from __future__ import annotations

import torch
from hypothesis import settings
from tests.presses.weights import given_weights as given_weights

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
settings.register_profile("coldpress", deadline=None, derandomize=True, database=None)
settings.load_profile("coldpress")
