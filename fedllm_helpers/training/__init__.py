"""Fine-tuning on cards, and the rates of a federation's rounds. Taught in notebook 02; DP-SGD in 05.

:mod:`fine_tuning` runs the Trainer, :mod:`batches` makes tokens and labels of cards, :mod:`dp_sgd` clips and adds noise
for every card, and :mod:`guarantees` says what that promises.
"""

from fedllm_helpers.training.fine_tuning import AdapterTrainer, Round, TrainingRecord, fine_tune, round_config, rounds

__all__ = ["AdapterTrainer", "Round", "TrainingRecord", "fine_tune", "round_config", "rounds"]
