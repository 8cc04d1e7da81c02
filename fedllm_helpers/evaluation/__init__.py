"""How good a model is: likelihood, greedy answers and multiple choice, with intervals. Taught in notebook 02."""

from fedllm_helpers.faces import face

NAMES = {
    "AnswerScores": "scoring",
    "Estimate": "intervals",
    "accuracy": "scoring",
    "generate": "scoring",
    "holm": "intervals",
    "mean_nll": "scoring",
    "nll_difference": "scoring",
    "over_seeds": "intervals",
    "p_text": "intervals",
    "perplexity": "scoring",
    "score_answers": "scoring",
    "token_losses": "tokens",
    "token_scores": "tokens",
}
__getattr__, __dir__, __all__ = face(__name__, NAMES)
