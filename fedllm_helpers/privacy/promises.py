"""What an app says in its reply of the noise it added, for the mod of a hospital's policy, which takes it out.

That is of its training by DP-SGD, or of a score. It stands apart from :mod:`policy`, as a trainer makes it.
"""

from flwr.app import ConfigRecord

from fedllm_helpers.privacy.accounting import RecordPrivacy

PROMISE = "promise"  # the record of a reply


def promise(plan: RecordPrivacy, steps: int, *, seeded: bool = False) -> dict[str, ConfigRecord]:
    """The record for a reply, by its name.

    Args:
        plan: by which it was trained or scored, over all rounds.
        steps: of this training; 1 for a score.
        seeded: whether somebody else knows the seed of the noise, and so can take it off.
    """
    mechanism = {"noise": plan.noise_multiplier, "rate": plan.sample_rate, "steps": steps}
    return {PROMISE: ConfigRecord({**mechanism, "clipping-norm": plan.clipping_norm, "seeded": seeded})}
