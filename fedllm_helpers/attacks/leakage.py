"""What an adapter gives away of a secret: canaries, their exposure, and whether they can be read out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from omegaconf import DictConfig
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fedllm_helpers import evaluation, models
from fedllm_helpers.data import format_prompt

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


def canaries(copies: Sequence[int] = (0, 1, 4, 16), each: int = 1, seed: int = 0) -> list[Canary]:
    """Plainly fictional canaries with random secrets. Taught in notebook 05a.

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


def candidates(model: PeftModel, tokenizer: PreTrainedTokenizerBase, canary: Canary, cfg: DictConfig) -> np.ndarray:
    """log p of the canary's line with each of the 1000 secrets, up to a constant, of shape (1000,)."""
    texts = [
        f"{format_prompt(canary.question, cfg.dataset.prompt)} {canary.answer(f'{n:03d}')}" for n in range(SECRETS)
    ]
    return np.nan_to_num(_likelihood(model, tokenizer(texts)["input_ids"]), nan=-np.inf)  # of a broken model


def exposure(likelihood: np.ndarray, canary: Canary, reference: np.ndarray | None = None) -> float:
    """Bits that a model gives away of a canary's secret: log₂ of the candidates over the rank of the true one.

    A model that knows nothing has rank uniform in 1 to 1000, so exposure is above x with probability 2^−x; the largest
    is log₂ 1000 = 9.97. Source: Carlini et al. 2019, arXiv:1802.08232. Taught in notebook 05a.

    Args:
        likelihood: from :func:`candidates`.
        canary: whose secret is ranked.
        reference: of the public base model. Some numbers are likely to every model; by what a number *gained* the rank
            is of what training did (*calibrated* exposure).
    """
    gained = likelihood if reference is None else _gained(likelihood, reference)
    own = gained[int(canary.secret)]
    better, ties = (gained > own).sum(), (gained == own).sum() - 1
    return float(np.log2(SECRETS) - np.log2(better + ties / 2 + 1))


def _gained(likelihood: np.ndarray, reference: np.ndarray) -> np.ndarray:
    broken = np.isneginf(likelihood) | np.isneginf(reference)
    return np.where(broken, -np.inf, np.where(broken, 0, likelihood) - np.where(broken, 0, reference))


def extracted(model: PeftModel, tokenizer: PreTrainedTokenizerBase, canary: Canary, cfg: DictConfig) -> bool:
    """Whether the greedy answer to the canary's question holds its secret. A guess does so once in about 1000."""
    return canary.secret in evaluation.generate(model, tokenizer, [canary.question], cfg, max_new_tokens=12)[0]


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
