"""Exact statistics of counts: the interval of a share, and whether two classifiers differ. Pure."""

from typing import Literal

from scipy import stats

Side = Literal["two-sided", "greater", "less"]


def share_interval(hits: int, total: int, confidence: float = 0.95, side: Side = "two-sided") -> tuple[float, float]:
    """The interval of a share of Clopper and Pearson (1934); with "greater" only its lower end is a bound."""
    ends = stats.binomtest(hits, total, alternative=side).proportion_ci(confidence, "exact")
    return float(ends.low), float(ends.high)


def mcnemar(first: int, second: int, side: Side = "two-sided") -> float:
    """p-value of McNemar's exact test (1947) of the images that one of two classifiers alone has right."""
    return float(stats.binomtest(first, first + second, alternative=side).pvalue) if first + second else 1.0
