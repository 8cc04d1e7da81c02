"""A federation with adapters of a few numbers: Flower's messages and strategies, no language model."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # noqa: F401

from fedllm_helpers import config
from fedllm_helpers.adapters import packing
from fedllm_helpers.federation import server_app
from fedllm_helpers.grids import in_process
from fedllm_helpers.privacy import masked_clients

START = {"b.A": np.zeros((2, 5), np.float32), "a.B": np.ones((3, 2), np.float32)}  # not in the alphabet's order


def update(adapter, hospital, number):
    """What a hospital makes of an adapter: a fixed pseudo-random step towards a point of its own."""
    rng = np.random.default_rng([hospital, number])
    return {
        key: (value + 0.1 * rng.normal(hospital, 1, value.shape)).astype(np.float32) for key, value in adapter.items()
    }


def client(faults=None, seen=None, orders=None):
    """A ClientApp; ``faults`` maps (round, hospital) to what is done to its reply, ``seen`` and ``orders`` collect."""

    def app(message, context):
        hospital, hospitals = context.node_config["partition-id"], context.node_config["num-partitions"]
        numbers = {"partition-id": hospital, "num-partitions": hospitals}
        if message.metadata.message_type.startswith("query"):
            numbers |= {"num-examples": 10 * (hospital + 1)}
            return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)
        number = message.content["config"]["server-round"]
        if seen is not None:
            seen.append((number, hospital, message.content["config"].get("lr")))
        if orders is not None:
            orders.append(dict(message.content["config"]))
        if message.metadata.message_type == "evaluate":
            numbers |= {"num-examples": hospital + 1, "nll": float(hospital)}
            return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)
        moment = number + 100 * message.content["config"].get("attempt", 0)
        adapter = update({k: a.numpy() for k, a in message.content["arrays"].items()}, hospital, moment)
        numbers |= {"num-examples": 10 * (hospital + 1), "examples": 8, "tokens": 80, "seconds": 0.01}
        numbers |= {"loss-before": 3.0, "loss-after": 2.0}
        fault = (faults or {}).get((number, hospital))
        if fault:
            adapter, numbers = fault(adapter, numbers)
        arrays = ArrayRecord({key: Array(value) for key, value in adapter.items()})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(numbers)}), reply_to=message)

    return app


def masked(app):
    """A ClientApp with the mod and its two answers."""
    answers = {"query.shares": masked_clients.shares, "query.reveal": masked_clients.reveal}

    def whole(message, context):
        answer = answers.get(message.metadata.message_type)
        return answer(message, context) if answer else masked_clients.mod(message, context, app)

    return whole


def settings(*overrides, hospitals=4, rounds=3):
    """The cpu preset for so many hospitals."""
    return config.load("cpu", f"federation.num_clients={hospitals}", f"federation.num_rounds={rounds}", *overrides)


def federate(cfg, app=None, grid=in_process.InProcessGrid, **options):
    """(adapter, tables) of a tiny federation."""
    with grid(app or client(), cfg.federation.num_clients, {}) as nodes:
        return server_app.federate(
            nodes, cfg, {key: value.copy() for key, value in START.items()}, server_app.Options(**options)
        )


class Shuffled(in_process.InProcessGrid):
    """Like Flower's own grids: node numbers at random, messages gone through twice, replies as a list in any order."""

    lazy = False

    def __init__(self, app, num_clients, run_config):
        super().__init__(lambda message, context: packing.client_mod(message, context, app), num_clients, run_config)

    def get_node_ids(self):
        return np.random.default_rng(5).permutation(list(super().get_node_ids())).tolist()

    def push_messages(self, messages):
        count, numbers = sum(1 for _ in messages), super().push_messages(messages)
        assert len(numbers) == count > 0
        return numbers

    def pull_messages(self, message_ids):
        return list(super().pull_messages(message_ids))[::-1]
