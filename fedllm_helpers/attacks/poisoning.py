"""A hospital that cheats, or whose disk is broken: a ClientApp whose replies are finite, well formed and harmful."""

from collections.abc import Callable, Collection

import numpy as np
from flwr.app import Context, Message

from fedllm_helpers.adapters.records import Adapter, from_record, to_record
from fedllm_helpers.federation import client_app

KINDS = ("flipped", "garbage")


def poisoned(received: Adapter, trained: Adapter, kind: str, strength: float, seed: int = 0) -> Adapter:
    """What a dishonest hospital sends in place of its adapter. Taught in notebook 04.

    Args:
        received: the average that it got.
        trained: what an honest hospital would send.
        kind: ``"flipped"``: the update turned round, ``strength`` times as long. ``"garbage"``: normal noise on the
            average, ``strength`` times as long as the honest update.
        strength: above 0.
        seed: of the noise.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"poison {kind!r}: allowed are {', '.join(KINDS)}")
    update = {key: trained[key] - received[key] for key in received}
    if kind == "flipped":
        return {key: (received[key] - strength * value).astype(np.float32) for key, value in update.items()}
    rng = np.random.default_rng(seed)
    noise = {key: rng.normal(size=value.shape) for key, value in update.items()}
    length = [np.sqrt(sum(np.square(v, dtype=np.float64).sum() for v in some.values())) for some in (update, noise)]
    factor = strength * length[0] / length[1]
    return {key: (received[key] + factor * noise[key]).astype(np.float32) for key in update}


def client(hospitals: Collection[int], kind: str, strength: float = 10.0) -> Callable[[Message, Context], Message]:
    """The package's ClientApp, in which some hospitals send :func:`poisoned` adapters; for ``simulation.run``.

    Masked, compressed or cut adapters cannot be poisoned so: for FedIT in float32.

    Raises:
        ValueError: an unknown kind.
    """
    poisoned({}, {}, kind, strength) if kind not in KINDS else None

    def app(message: Message, context: Context) -> Message:
        """One message to one hospital."""
        received = message.content.array_records.get("arrays")
        received = received and from_record(received)
        reply, hospital = client_app.app(message, context), context.node_config["partition-id"]
        if message.metadata.message_type == "train" and hospital in hospitals and not reply.has_error():
            number = int(message.content["config"]["server-round"])
            trained = from_record(reply.content["arrays"])
            reply.content["arrays"] = to_record(poisoned(received, trained, kind, strength, 1000 * hospital + number))
        return reply

    return app
