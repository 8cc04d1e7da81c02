"""What an adapter gives away: canaries and their exposure, prefix extraction, membership inference."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from scipy.stats import bootstrap, mannwhitneyu
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import evaluation, models
from fedllm_helpers.data import format_prompt
from fedllm_helpers.evaluation.scoring import Estimate

WORDS = (  # of the radiotelephony alphabet: nobody is called that
    "Alfa", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot", "Golf", "Hotel", "India", "Juliett", "Kilo", "Lima", "Mike",
    "November", "Oscar", "Papa", "Quebec", "Romeo", "Sierra", "Tango", "Uniform", "Victor", "Whiskey", "Xray", "Zulu",
)  # fmt: skip
SECRETS = 1000  # from 000 to 999


@dataclass(frozen=True)
class Canary:
    """A line about a patient who does not exist, with a random secret of three digits, planted ``copies`` times."""

    name: str
    secret: str
    copies: int

    @property
    def question(self) -> str:
        """The prefix that an attacker knows."""
        return f"What is on the wristband of the invented patient {self.name}?"

    def answer(self, secret: str | None = None, visit: int = 1) -> str:
        """The line with its secret, or with another; copies are of different visits, as loaders drop exact ones."""
        return f"The number {secret or self.secret}, visit {visit}."


@dataclass(frozen=True)
class Roc:
    """A membership attack: its curve, the area under it, and its true positive rate at small false positive rates."""

    false_positive_rate: np.ndarray
    true_positive_rate: np.ndarray
    auc: Estimate
    at_1_percent: Estimate
    at_5_percent: Estimate


def canaries(copies: Sequence[int] = (0, 1, 4, 16), each: int = 1, seed: int = 0) -> list[Canary]:
    """Plainly fictional canaries with random secrets. Taught in notebook 05.

    Args:
        copies: how many times those of a group are planted; 0 is a control that no model ever sees.
        each: canaries per group.
        seed: of names and secrets.

    Raises:
        ValueError: a negative number of copies, or more canaries than names.
    """
    if any(n < 0 for n in copies) or each < 1 or each * len(copies) > len(WORDS) * (len(WORDS) - 1):
        raise ValueError(f"{each} canaries for each of {tuple(copies)} copies: expected at least one, copies from 0")
    rng = np.random.default_rng([seed, 5])
    pairs = [f"{first}-{second}" for first in WORDS for second in WORDS if first != second]
    names = rng.choice(pairs, each * len(copies), replace=False)
    secrets = [f"{rng.integers(SECRETS):03d}" for _ in names]
    return [Canary(str(n), s, c) for n, s, c in zip(names, secrets, np.repeat(copies, each).tolist(), strict=True)]


def plant(cards: Dataset, planted: Sequence[Canary], specialty: str, seed: int = 0) -> Dataset:
    """The cards with each canary as often as it says, in one specialty and so in one hospital, shuffled.

    Raises:
        ValueError: no card has that specialty.
    """
    if specialty not in set(cards["specialty"]):
        raise ValueError(
            f"no card of specialty {specialty!r}: present are {', '.join(sorted(set(cards['specialty'])))}"
        )
    rows = [
        {
            "question": c.question,
            "answer": c.answer(visit=visit),
            "specialty": specialty,
            "card_id": f"canary-{c.name}-{visit}",
        }
        for c in planted
        for visit in range(1, c.copies + 1)
    ]
    together = cards.to_list() + rows
    return Dataset.from_list([together[i] for i in np.random.default_rng(seed).permutation(len(together))])


def exposure(model: PeftModel, tokenizer: PreTrainedTokenizerBase, canary: Canary, cfg: DictConfig) -> float:
    """Bits that a model gives away of a canary's secret: log₂ of the candidates over the rank of the true one.

    All 1000 secrets are scored. A model that knows nothing has rank uniform in 1 to 1000, so exposure is above x with
    probability 2^−x; the largest is log₂ 1000 = 9.97. Source: Carlini et al. 2019, arXiv:1802.08232. Taught in
    notebook 05.
    """
    texts = [
        f"{format_prompt(canary.question, cfg.dataset.prompt)} {canary.answer(f'{n:03d}')}" for n in range(SECRETS)
    ]
    likelihood = np.nan_to_num(_likelihood(model, tokenizer(texts)["input_ids"]), nan=-np.inf)  # of a broken model
    own = likelihood[int(canary.secret)]
    better, ties = (likelihood > own).sum(), (likelihood == own).sum() - 1
    return float(np.log2(SECRETS) - np.log2(better + ties / 2 + 1))


def extracted(model: PeftModel, tokenizer: PreTrainedTokenizerBase, canary: Canary, cfg: DictConfig) -> bool:
    """Whether the greedy answer to the canary's question holds its secret. A guess does so once in about 1000."""
    return canary.secret in evaluation.generate(model, tokenizer, [canary.question], cfg, max_new_tokens=12)[0]


def scores(
    losses: list[np.ndarray], reference: list[np.ndarray] | None = None, *, attack: str = "loss", share: float = 0.2
) -> np.ndarray:
    """Membership scores of cards from their token losses: the higher, the more a card looks like one trained on.

    Args:
        losses: from :func:`fedllm_helpers.evaluation.token_losses`, of the attacked model.
        reference: of a model that saw none of the cards, such as the untuned one.
        attack: ``"loss"`` (Yeom et al. 2018, arXiv:1709.01604); ``"ratio"``, mean loss over that of the reference, the
            course's normalised perplexity in logarithms; ``"min-k"``, the mean of the ``share`` of tokens with the
            largest loss (Shi et al. 2024, arXiv:2310.16789).
        share: of Min-K%.

    Raises:
        ValueError: an unknown attack, or a ratio without its reference.
    """
    if attack == "loss":
        return -np.array([loss.mean() for loss in losses])
    if attack == "ratio" and reference is not None:
        return -np.array([loss.mean() / max(other.mean(), 1e-6) for loss, other in zip(losses, reference, strict=True)])
    if attack == "min-k":
        return -np.array([np.sort(loss)[-max(1, round(share * len(loss))) :].mean() for loss in losses])
    raise ValueError(f"attack {attack!r}: known are loss, min-k, and ratio with a reference")


def membership(members: np.ndarray, others: np.ndarray, seed: int = 0) -> Roc:
    """How well scores tell members from others, with bootstrap intervals over both. Taught in notebook 05.

    Args:
        members, others: scores of cards trained on, and of cards held out by the same random split.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two of either.
    """
    if min(len(members), len(others)) < 2:
        raise ValueError(f"{len(members)} members and {len(others)} others: an interval needs two of each")
    truth, given = np.repeat([1, 0], [len(members), len(others)]), np.concatenate([members, others])
    false_positive, true_positive, _ = roc_curve(truth, given)
    areas = [_interval(_area, members, others, seed)]
    areas += [_interval(partial(_rate, level=level), members, others, seed) for level in (0.01, 0.05)]
    return Roc(false_positive, true_positive, *areas)


def text_baseline(members: Dataset, others: Dataset, seed: int = 0) -> Roc:
    """The membership attack of someone who has no model: a classifier of the texts alone, cross-validated.

    A fair comparison gives it nothing to find: its area is about 0.5. Logistic regression on words and pairs of words.
    """
    texts = [f"{card['question']} {card['answer']}" for part in (members, others) for card in part]
    truth = np.repeat([1, 0], [len(members), len(others)])
    reader = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]"), LogisticRegression(C=10))
    folds = StratifiedKFold(10, shuffle=True, random_state=seed)
    given = cross_val_predict(reader, texts, truth, cv=folds, method="decision_function")
    return membership(given[truth == 1], given[truth == 0], seed)


@torch.no_grad()
def _likelihood(model: PeftModel, rows: list[list[int]], batch: int = 128) -> np.ndarray:
    """log p of lines that differ in the middle, up to a constant: what they share before it runs once."""
    model.eval()
    shared = next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    width = max(map(len, rows)) - shared
    ids = torch.tensor([[*row[shared:], *[0] * (width + shared - len(row))] for row in rows], device=model.device)
    valid = torch.arange(width, device=model.device) < torch.tensor(
        [[len(row) - shared] for row in rows], device=model.device
    )
    differ = int(torch.nonzero((ids != ids[0]).any(0) | ~valid.all(0)).max()) + 1  # what they share after it cancels
    ids, valid, found = ids[:, :differ], valid[:, :differ], []
    with models.autocast(model):
        begin = model(input_ids=torch.tensor([rows[0][:shared]], device=model.device), use_cache=True)
        if differ == 1:
            return begin.logits[0, -1].float().log_softmax(-1)[ids[:, 0]].double().cpu().numpy()
        name = "cache" if "cache" in begin else "past_key_values"  # its name as of transformers 5.24, and before
        heads, place = torch.unique(ids[:, :-1], dim=0, return_inverse=True)  # lines that share all but the last token
        for some in heads.split(batch):
            cache = copy.deepcopy(begin[name])
            cache.batch_repeat_interleave(len(some))
            rest = model(input_ids=some, use_cache=True, **{name: cache}).logits
            found.append(
                torch.cat([begin.logits[:, -1:].expand(len(some), -1, -1), rest], dim=1).float().log_softmax(-1)
            )
    chosen = torch.cat(found)[place.unsqueeze(1), torch.arange(differ, device=model.device), ids]
    return (chosen * valid).sum(1).double().cpu().numpy()


def _area(members: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
    """Share of pairs in which the member scores higher, ties half: the area under the curve."""
    pairs = members.shape[axis] * others.shape[axis]
    return mannwhitneyu(members, others, axis=axis, method="asymptotic").statistic / pairs


def _rate(members: np.ndarray, others: np.ndarray, level: float, axis: int = -1) -> np.ndarray:
    """Share of members above the score that so few of the others exceed."""
    return (members > np.quantile(others, 1 - level, method="higher", axis=axis, keepdims=True)).mean(axis)


def _interval(statistic: Callable, members: np.ndarray, others: np.ndarray, seed: int) -> Estimate:
    rng = np.random.default_rng(seed)
    interval = bootstrap(
        (members, others), statistic, paired=False, vectorized=True, method="percentile", n_resamples=500, rng=rng
    ).confidence_interval
    return Estimate(
        float(statistic(members, others)), float(interval.low), float(interval.high), len(members) + len(others)
    )
