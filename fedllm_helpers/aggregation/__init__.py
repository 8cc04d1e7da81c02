"""How adapters are combined, and what of them crosses the network. Taught in notebooks 03 and 04.

:mod:`strategies` has the weighted mean and what keeps Flower's strategies from ending a run; :mod:`rules` is what all
rules of federated LoRA share, their client mod included, and each rule is a file; :mod:`edits` are what two of them add
to the base model.
"""

from fedllm_helpers.faces import face

NAMES = {
    "FFALoRA": "ffa",
    "FLoRA": "flora",
    "FedExLoRA": "fedex",
    "FedIT": "fedit",
    "FedSALoRA": "fedsa",
    "FlexLoRA": "flexlora",
    "LoRAXS": "loraxs",
    "RoLoRA": "rolora",
    "weighted_mean": "strategies",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
