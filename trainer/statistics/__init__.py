"""How sure a figure is: intervals by bootstrap over images, paired tests, calibration.

Rows of one image share its picture, so they are not independent: what is drawn again is
images, each with all its rows (the cluster bootstrap; Field and Welsh 2007,
doi:10.1111/j.1467-9868.2007.00593.x). Intervals are percentiles of the figure over the
draws (Efron and Tibshirani 1993, ch. 13); where these have no width, a share has Wilson's
interval, any other figure none. They say how far a figure of *this* run could lie from what it
is on all such images; not how far another seed of training would.
"""

from trainer.statistics.calibration import TEMPERATURES, fit_temperature, reliability
from trainer.statistics.clustered import LEVEL, Clustered, Interval, middle, percentiles
from trainer.statistics.figures import bootstrap, intervals, intervals_of, threshold_interval
from trainer.statistics.shares import (
    FEW_IMAGES,
    mcnemar,
    paired_difference,
    permutation,
    proportion_interval,
)

__all__ = [
    "FEW_IMAGES",
    "LEVEL",
    "TEMPERATURES",
    "Clustered",
    "Interval",
    "bootstrap",
    "fit_temperature",
    "intervals",
    "intervals_of",
    "mcnemar",
    "middle",
    "paired_difference",
    "percentiles",
    "permutation",
    "proportion_interval",
    "reliability",
    "threshold_interval",
]
