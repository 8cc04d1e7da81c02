"""Fine-tuning on cards, and the rates of a federation's rounds. Taught in notebook 02; DP-SGD in 05b.

:mod:`fine_tuning` runs the Trainer, :mod:`batches` makes tokens and labels of cards, :mod:`schedule` has the rates and
settings of a federation's rounds, :mod:`dp_sgd` clips and adds noise for every card, and :mod:`guarantees` says what
that promises.
"""

from fedllm_helpers.faces import face

NAMES = {
    "AdapterTrainer": "fine_tuning",
    "Round": "schedule",
    "TrainingRecord": "fine_tuning",
    "fine_tune": "fine_tuning",
    "round_config": "schedule",
    "rounds": "schedule",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
