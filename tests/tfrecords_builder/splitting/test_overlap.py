"""Matches between two collections, against every pair compared by hand."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.ndimage import uniform_filter

from tfrecords_builder.splitting.near_duplicates import COARSE_THRESHOLD, FINE_THRESHOLD
from tfrecords_builder.splitting.overlap import ComparedImages, Kind, Match, find_matches


def images(rng: np.random.Generator, pool: np.ndarray, count: int) -> ComparedImages:
    """Thumbnails of `pool`, some with noise; few digests and patients, so that many are shared."""
    chosen = rng.integers(0, len(pool), count)
    noise = rng.normal(0, 3, (count, 64, 64))
    return ComparedImages(
        rng.integers(0, 12, count).tolist(),
        [frozenset(map(str, rng.choice(6, rng.integers(0, 3)))) for _ in range(count)],
        np.clip(pool[chosen] + noise, 0, 255).astype(np.uint8),
    )


def correlations(thumbnails: np.ndarray, thumbnail: np.ndarray) -> np.ndarray:
    """[N, 2]: of the means of blocks, and of the band, with one thumbnail."""
    both = np.concatenate([thumbnails, thumbnail[None]]).astype(np.float64)
    blocks = both.reshape(-1, 16, 4, 16, 4).mean((2, 4)).reshape(len(both), -1)
    wide = uniform_filter(both, (0, 9, 9), mode="nearest")
    band = uniform_filter(both - wide, (0, 3, 3), mode="nearest").reshape(len(both), -1)
    return np.stack([np.corrcoef(blocks)[-1, :-1], np.corrcoef(band)[-1, :-1]], 1)


def by_hand(first: ComparedImages, second: ComparedImages) -> list[Match]:
    matches = []
    for number in range(len(second.digests)):
        same = [other for other, digest in enumerate(first.digests) if digest == second.digests[number]]
        if same:
            matches.append(Match(number, same[0], Kind.IDENTICAL))
        else:
            scores = {
                other: float(fine)
                for other, (coarse, fine) in enumerate(correlations(first.thumbnails, second.thumbnails[number]))
                if coarse > COARSE_THRESHOLD and fine > FINE_THRESHOLD
            }
            if scores:
                best = max(scores, key=lambda other: (scores[other], -other))
                matches.append(Match(number, best, Kind.NEAR_DUPLICATE, scores[best]))
        patients = [other for other, names in enumerate(first.patients) if names & second.patients[number]]
        if patients:
            matches.append(Match(number, patients[0], Kind.PATIENT))
    return matches


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(0, 8))
def test_every_match_and_no_other(seed: int, count: int, others: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(40, 215, (5, 16, 16))
    pool = np.kron(blocks, np.ones((1, 4, 4)))
    first, second = images(rng, pool, count), images(rng, pool, others)
    found, expected = find_matches(first, second), by_hand(first, second)
    assert [match[:1] + match[2:3] for match in found] == [match[:1] + match[2:3] for match in expected]
    for match, other in zip(found, expected, strict=True):
        if match.kind is Kind.NEAR_DUPLICATE:  # two may be equally alike but for rounding
            score = correlations(first.thumbnails, second.thumbnails[match.second])[match.first, 1]
            assert match.score == pytest.approx(score, abs=1e-4)
            assert other.score == pytest.approx(score, abs=1e-4)
        else:
            assert match == other
