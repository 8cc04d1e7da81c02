"""A hospital's own policy as a YAML file: its keys, their meaning and limits. ``privacy.policy`` follows it."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def _key(default: Any, meaning: str) -> Any:
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class Policy:
    """What a hospital allows. Null sets no limit."""

    ledger: str | None = _key(None, "file of what was answered, over all runs; null is beside the policy, .ledger")
    largest_epsilon: float | None = _key(
        None, "ε of any one card by DP-SGD, and by noise on scores, over all rounds of all runs"
    )
    delta: float = _key(1e-5, "at which that ε is counted; well below 1 / cards")
    least_noise_multiplier: float | None = _key(None, "of a step of DP-SGD, in clipping norms")
    largest_clipping_norm: float | None = _key(
        None, "of a card's gradient in DP-SGD; of an update behind masks, where noise is added"
    )
    most_rounds: int | None = _key(None, "answered over all runs; one that is sent again counts again")
    least_hospitals: int | None = _key(None, "that open a masked sum; without masks nothing leaves")
    scores: bool | None = _key(
        None,
        "whether scores of held-out cards may leave: false is never, true also without noise. Null: with noise that "
        "largest_epsilon has room for; without it, too, if no ε, noise or number of hospitals is asked for",
    )
    losses: bool = _key(True, "whether losses, tokens and seconds may leave in a run that promises no privacy")
    rules: list[str] | None = _key(None, "of combining adapters that are followed, by name; FedIT is the plain average")
    known_noise: bool = _key(False, "whether a run may know the seed of the noise, and so take it off")


def load(path: str | Path) -> Policy:
    """Read a policy.

    Raises:
        ValueError: an unknown key, a wrong type or a value out of its limits, in one line.
        OSError: the file cannot be read.
    """
    try:
        given = OmegaConf.load(Path(path).expanduser())
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Policy), given))
    except OSError:
        raise
    except Exception as error:  # of YAML and of OmegaConf, a dozen types
        raise ValueError(f"{path}: {str(error).splitlines()[0]}; known are {_names()}") from None
    _check(found, path)
    home = Path(path).expanduser().absolute()
    found.ledger = str(home.parent / Path(found.ledger or home.with_suffix(".ledger")).expanduser())
    if found.scores is None:
        limits = (found.largest_epsilon, found.least_noise_multiplier, found.least_hospitals)
        found.scores = True if all(limit is None for limit in limits) else None
    return found


def _names() -> str:
    return ", ".join(one.name for one in fields(Policy))


def _check(found: Policy, path: str | Path) -> None:
    above = ("largest_epsilon", "least_noise_multiplier", "largest_clipping_norm")
    limits = {name: (lambda value: 0 < value < math.inf, "numbers above 0") for name in above}
    limits["delta"] = (lambda value: 0 < value < 0.1, "numbers above 0 and below 0.1")
    limits["most_rounds"] = (lambda value: value >= 0, "whole numbers from 0")
    limits["least_hospitals"] = (lambda value: value >= 2, "whole numbers from 2")
    for name, (fits, allowed) in limits.items():
        value = getattr(found, name)
        if value is not None and not fits(value):
            raise ValueError(f"{path}: {name}={value!r}: allowed are {allowed}")
