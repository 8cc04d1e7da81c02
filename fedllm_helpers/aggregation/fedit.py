"""FedIT: both factors are sent and averaged, each by itself (Zhang et al. 2023, arXiv:2305.05644).

A mean of factors is not the mean of updates: notebook 04 measures what is lost. A layer of rank r costs
r · (inputs + outputs) numbers in either direction.
"""

from fedllm_helpers.aggregation.ruled import Rule


class FedIT(Rule):
    """The wrapped strategy on both factors; clients need no mod."""
