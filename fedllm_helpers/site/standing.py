"""What a hospital's policy allows, what is spent and what is left, for the people of the hospital.

``python -m fedllm_helpers.policy FILE`` prints it; ``--new FILE`` writes a policy with every key, its meaning and no
limit, to be changed; ``--begin FILE`` begins the ledger of one, once.
"""

import argparse
from dataclasses import fields
from pathlib import Path

from omegaconf import OmegaConf

from fedllm_helpers import folders
from fedllm_helpers.privacy import policy
from fedllm_helpers.privacy.ledger import BEGIN, ROUND, Ledger


def standing(path: str | Path) -> str:
    """The lines that the command prints.

    Raises:
        ValueError: policy or ledger cannot be read.
        OSError: there is no such policy.
    """
    found = policy.load(path)
    ledger = Ledger(found.ledger)
    rounds, spent = ledger.entries(ROUND), ledger.epsilon(found.delta)
    rows = [("", "allowed", "so far", "left")]
    rows.append((f"ε of a card, at δ = {found.delta:g}", *_left(found.largest_epsilon, spent)))
    rows.append(("rounds answered", *_left(found.most_rounds, len(rounds))))
    lines = [f"{what:28} {limit:>10} {so_far:>10} {left:>10}".rstrip() for what, limit, so_far, left in rows]
    others = [one.name for one in fields(found) if one.name not in ("largest_epsilon", "most_rounds", "delta")]
    lines += [f"{name}: {_text(getattr(found, name))}" for name in others if name != "scores"]
    lines.append(f"scores: {'with noise alone' if found.scores is None else _text(found.scores)}")
    if open_ := sum(not one.get("private") for one in rounds):
        lines.append(f"rounds that promised nothing, beside that ε: {open_}")
    if rounds:
        last = rounds[-1]
        lines.append(f"last answer: round {last['number']} of run {last['run']}, {last['time']}")
    return "\n".join(lines)


def _left(limit: float | None, so_far: float) -> tuple[str, str, str]:
    return ("any" if limit is None else f"{limit:g}", f"{so_far:.4g}", "" if limit is None else f"{limit - so_far:.4g}")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "any" if value is None else ", ".join(value) if isinstance(value, list) else str(value)


def blank() -> str:
    """A policy with every key and its meaning, that sets no limit."""
    lines = ["# What this hospital lets leave, whatever a server orders; null sets no limit."]
    given = OmegaConf.to_yaml(OmegaConf.structured(policy.Policy)).splitlines()
    lines += [
        f"{value:30} # {one.metadata['meaning']}" for value, one in zip(given, fields(policy.Policy), strict=True)
    ]
    return "\n".join(lines) + "\n"


def begin(path: str | Path) -> None:
    """Begin the ledger of a policy, before the first round.

    Raises:
        ValueError: the policy cannot be read, or its ledger is there already.
        OSError: there is no such policy, or the ledger cannot be made.
    """
    ledger = Ledger(policy.load(path).ledger)
    try:
        ledger.begin()
    except FileExistsError:
        raise ValueError(f"{ledger.path} is there already, and stays as it is") from None


def main() -> None:
    """Command line of a hospital's policy."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("file", type=Path, help="YAML, as a node is given it by --node-config policy=FILE")
    first = parser.add_mutually_exclusive_group()
    first.add_argument("--new", action="store_true", help="write a new one there, in which nothing is limited")
    first.add_argument("--begin", action="store_true", help="begin its ledger, before the first round")
    arguments = parser.parse_args()
    try:
        if arguments.new:
            if arguments.file.exists():
                raise ValueError(f"{arguments.file} is there already, and stays as it is")
            folders.write(arguments.file, blank())
            print(f"{arguments.file}: set your limits, and where the ledger lies; then {BEGIN}")
            return
        if arguments.begin:
            begin(arguments.file)
        print(standing(arguments.file))
    except (ValueError, OSError) as error:
        parser.error(str(error))
