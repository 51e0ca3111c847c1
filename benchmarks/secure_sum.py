"""What it costs a site to hide its values from the coordinator, and the coordinator to add them up.

All sites work in this process, one after the other, so CPU seconds are each site's own. Beside
them stands the time that the cipher alone needs for the same key streams: no masks can cost less.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time as clock
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from cross_validation import Figures, run, whole

from fusion.keys import SigningKey, key_stream
from fusion.secure_sum import MaskContext, Masker, unmask

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Words of one stream at a time; a longer one would measure memory instead of the cipher.
_STREAM_WORDS = 1 << 15


def draw(n_sites: int, n_values: int, *, seed: int) -> dict[str, Floats]:
    """Draw (n_values,) values per site of either sign, in size from 1e-9 to 1e12."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-9, 12, n_values)
    return {f"site-{i + 1:03d}": sizes * rng.normal(size=n_values) for i in range(n_sites)}


def measure(values: Mapping[str, Floats]) -> dict[str, float]:
    """CPU seconds of the parties in one round with new keys, and the error of its total."""
    maskers, made = _timed(partial(_maskers, tuple(values)))
    certificates = {site: masker.certificate for site, masker in maskers.items()}
    publics = {site: public for site, (public, _) in certificates.items()}
    signatures = {site: signature for site, (_, signature) in certificates.items()}
    agreed = [_timed(partial(x.agree, publics, signatures))[1] for x in maskers.values()]
    masked = {s: _timed(partial(x.mask, values[s], round=1)) for s, x in maskers.items()}
    words = {site: found for site, (found, _) in masked.items()}
    sites = [k + m for k, (_, m) in zip(agreed, masked.values(), strict=True)]
    total, added = _timed(partial(unmask, words, roster=tuple(values)))
    each = made / len(values)
    return {
        "site_cpu_s": each + statistics.mean(sites),
        "slowest_site_cpu_s": each + max(sites),
        "agree_cpu_s": each + statistics.mean(agreed),
        "mask_cpu_s": statistics.mean(m for _, m in masked.values()),
        "coordinator_cpu_s": added,
        "cipher_alone_cpu_s": _cipher_alone(len(values) - 1, total.size),
        **_errors(total, values),
    }


def _maskers(sites: tuple[str, ...]) -> dict[str, Masker]:
    keys = {site: SigningKey.generate() for site in sites}
    trusted = {site: key.public for site, key in keys.items()}
    context = MaskContext("benchmark", "protocol", "run", 1, sites)
    return {s: Masker(context, site=s, key=keys[s], trusted=trusted) for s in sites}


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = clock.process_time()
    found = work()
    return found, clock.process_time() - started


def _cipher_alone(n_peers: int, n_values: int) -> float:
    """CPU seconds of ChaCha20 for all streams of one site."""

    def streams() -> None:
        for i in range(-(-2 * n_peers * n_values // _STREAM_WORDS)):
            key_stream(i.to_bytes(32), _STREAM_WORDS)

    return _timed(streams)[1]


def _errors(total: Floats, values: Mapping[str, Floats]) -> dict[str, float]:
    """Compare with a sum of more digits; relative errors are to the sum of the sites' sizes."""
    stacked = np.stack(list(values.values()))
    error = np.abs(total - stacked.sum(axis=0, dtype=np.longdouble)).astype(np.float64)
    sizes = np.abs(stacked)
    return {
        "largest_relative_error": float((error / sizes.sum(axis=0)).max()),
        "largest_error_below_1": float(error[sizes.sum(axis=0) < 1].max(initial=0.0)),
    }


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for; medians over its repeats."""
    values = draw(arguments.sites, arguments.values, seed=arguments.seed)
    repeats = [measure(values) for _ in range(arguments.repeat)]
    medians = {name: statistics.median(x[name] for x in repeats) for name in repeats[0]}
    return {
        "benchmark": "secure_sum",
        "sites": arguments.sites,
        "values": arguments.values,
        "bytes_from_a_site": 16 * arguments.values,
        **{name: float(f"{value:.4g}") for name, value in medians.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description="Cost and error of sums behind pairwise masks.")
    parser.add_argument("--sites", type=whole(3), default=5, help="whose values are added up")
    parser.add_argument("--values", type=whole(1), default=1_000_000, help="of each site")
    parser.add_argument("--repeat", type=whole(1), default=3, help="of timings; medians are shown")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the values, not of the keys")
    parser.add_argument("--json", action="store_true", help="the only form there is")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
