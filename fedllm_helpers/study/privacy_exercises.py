"""Checks of the exercises in code of notebooks 05a, 05b and 06, as in :mod:`exercises`."""

from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedllm_helpers.grids.in_process import InProcessGrid
from fedllm_helpers.study.exercises import OPEN, RIGHT

# of a run with two hospitals: who is asked, for what, and whether an answer is right
ORDERS = ((0, "train", True), (1, "train", True), (0, "query", True), (0, "train", True), (0, "train", False))
ORDERS += ((1, "train", True), (1, "train", False), (0, "query", True))


def shadow_models(score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None) -> str:
    """A membership attack that knows models trained on other halves of the cards. Exercise of notebook 05a.

    Args:
        score: from log-likelihoods of cards under the attacked model, shape (cards,), under shadow models, shape
            (models, cards), and whether each shadow model had each card, to a score per card, larger for members.

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if score is None:
        return OPEN
    rng = np.random.default_rng(0)
    member, inside = rng.random(400) < 0.5, rng.random((8, 400)) < 0.5
    inside[0] = ~inside[1]  # every card is missing in one of them
    hard = rng.normal(-60, 25, 400)  # some cards are hard for every model
    attacked = hard + 6 * member + rng.normal(size=400)
    shadows = hard + 6 * inside + rng.normal(size=(8, 400))
    found = np.asarray(score(attacked.copy(), shadows.copy(), inside.copy()))
    if found.shape != (400,):
        return f"not yet: 400 cards want scores of shape (400,), yours have {found.shape}"
    louder = np.asarray(score(attacked.copy(), np.where(inside, shadows + 100, shadows), inside.copy()))
    if not np.allclose(found, louder):
        return "not yet: your score of a card changes with what models say that were trained on that very card"
    area = float((found[member][:, None] > found[~member][None]).mean())
    return RIGHT if area > 0.95 else f"not yet: a member has the larger score in {area:.2f} of pairs; get above 0.95"


def clipped_by_patient(total: Callable[[np.ndarray, np.ndarray, float], np.ndarray] | None) -> str:
    """A clipped sum that one patient, with however many cards, moves by no more than C. Exercise of notebook 05b.

    Args:
        total: from the cards' gradients, shape (cards, values), the number of each card's patient and C, to the sum
            over patients of their mean gradients, each cut to length C.

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if total is None:
        return OPEN
    rng = np.random.default_rng(0)
    gradients, patients, limit = rng.normal(size=(40, 7)) * rng.gamma(1, 1, (40, 1)), rng.integers(3, 12, 40), 1.5
    found = np.asarray(total(gradients.copy(), patients.copy(), limit))
    if found.shape != (7,):
        return f"not yet: the sum has 7 values, yours has the shape {found.shape}"
    for one in np.unique(patients):
        rest = patients != one
        moved = float(np.linalg.norm(found - total(gradients[rest].copy(), patients[rest].copy(), limit)))
        if moved > limit * (1 + 1e-6):
            return f"not yet: a patient with {(~rest).sum()} cards moves the sum by {moved:.2f}, and C is {limit}"
    means = np.array([gradients[patients == one].mean(axis=0) for one in np.unique(patients)])
    wanted = (means * np.minimum(1, limit / np.linalg.norm(means, axis=1, keepdims=True))).sum(axis=0)
    return RIGHT if np.allclose(found, wanted) else "not yet: nobody moves it too far, but it is another sum"


def two_rounds_at_most(mod: Callable[[Message, Context, Callable], Message] | None) -> str:
    """A client mod by which a hospital answers two orders to train of a run, and no third. Exercise of notebook 06.

    Args:
        mod: from a message, the hospital's context and what would be called next, to the reply; it raises to refuse.

    Returns:
        ``right``, or in one line what is not right yet.
    """
    if mod is None:
        return OPEN
    trained: list[int] = []

    def next_(message: Message, context: Context) -> Message:
        """What stands behind the mod."""
        if message.metadata.message_type == "train":
            trained.append(message.metadata.dst_node_id)
        return Message(RecordDict(), reply_to=message)

    for run in (1, 2):  # the second one knows nothing of the first
        with InProcessGrid(lambda message, context: mod(message, context, next_), 2, {}) as grid:
            nodes = list(grid.get_node_ids())
            for number, (hospital, kind, right) in enumerate(ORDERS, 1):
                before, asked = len(trained), f"order {number} of run {run}, a {kind} for hospital {hospital}"
                (reply,) = grid.send_and_receive([Message(RecordDict(), nodes[hospital], kind)])
                if not right and len(trained) > before:
                    return f"not yet: {asked}, is the third, and is trained all the same"
                if reply.has_error() == right:
                    return f"not yet: {asked}, is {'refused' if right else 'answered'}; each hospital counts its own"
    return RIGHT
