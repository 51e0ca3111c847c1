"""Rows and bags with a known hazard, for tests of encoders."""

from __future__ import annotations

import numpy as np


def simulate_survival(
    log_hazard: np.ndarray, rng: np.random.Generator, *, round_days: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Event and time in days of patients with these log hazards, ties every ``round_days``."""
    event_time = rng.exponential(np.exp(-log_hazard)) * 1000
    censored = rng.exponential(1500, len(log_hazard))
    time = np.ceil(np.minimum(event_time, censored) / round_days) * round_days
    return event_time <= censored, time


def simulate_table(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten columns, of which four matter, linearly."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 10))
    event, time = simulate_survival(values[:, :4] @ np.array([0.8, -0.6, 0.5, 0.4]), rng)
    return values, event, time


def simulate_bags(
    n: int, seed: int, dim: int = 64
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Bags whose tile means two latent factors shift, under tile noise."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(dim, 6)))[0].T * np.array([[6], [5], [9], [8], [4], [3]])
    factors = rng.normal(size=(n, 6))
    event, time = simulate_survival(0.9 * factors[:, 0] + 0.7 * factors[:, 1], rng)
    bags = []
    for row in factors:
        size = int(rng.integers(9, 13))
        latent = row + rng.normal(size=(size, 6))
        bags.append((2 + latent @ axes + rng.normal(size=(size, dim))).astype(np.float32))
    return bags, event, time
