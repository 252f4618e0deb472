"""Comparisons of methods over seeds and items: intervals, corrected tests, equivalence, power, and frontiers."""

from refine_lab.statistics.contrasts import compare_methods, difference_spread
from refine_lab.statistics.crossed import Spread
from refine_lab.statistics.estimate import Estimate
from refine_lab.statistics.frontier import compare_frontiers, method_frontier
from refine_lab.statistics.holm import holm
from refine_lab.statistics.means import mean_interval, paired_difference
from refine_lab.statistics.power import power, seeds_needed
from refine_lab.statistics.scores import answer_scores, evaluation_scores

__all__ = [
    "Estimate",
    "Spread",
    "answer_scores",
    "compare_frontiers",
    "compare_methods",
    "difference_spread",
    "evaluation_scores",
    "holm",
    "mean_interval",
    "method_frontier",
    "paired_difference",
    "power",
    "seeds_needed",
]
