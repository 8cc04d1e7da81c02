"""How good a model is: likelihood, greedy answers and multiple choice, with intervals. Taught in notebook 02."""

from fedllm_helpers.evaluation.intervals import Estimate
from fedllm_helpers.evaluation.scoring import (
    AnswerScores,
    accuracy,
    generate,
    mean_nll,
    nll_difference,
    perplexity,
    score_answers,
)
from fedllm_helpers.evaluation.tokens import token_losses, token_scores

__all__ = [
    "AnswerScores",
    "Estimate",
    "accuracy",
    "generate",
    "mean_nll",
    "nll_difference",
    "perplexity",
    "score_answers",
    "token_losses",
    "token_scores",
]
