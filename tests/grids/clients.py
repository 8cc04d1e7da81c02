"""Clients that workers import: they count in their state, and do what the message says; no model, no torch."""

import logging
import os
import signal
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

AHEAD = "wave"  # a module that nothing here imports


def counts(message, context):
    """Add one to what it remembers, and reply with that and with its process; or fail in the way it is told."""
    orders = message.content["config"]
    before = (
        context.state["kept"]["count"].numpy() if "kept" in context.state.array_records else np.zeros(3, np.float32)
    )
    context.state["kept"] = ArrayRecord({"count": Array(before + 1)})
    time.sleep(float(orders.get("sleep", 0)))
    if orders.get("fault") == "raise":
        raise ArithmeticError(f"no good at hospital {context.node_config['partition-id']}")
    if orders.get("fault") == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if orders.get("fault") == "warn":
        logging.getLogger("fedllm_helpers.of.a.client").warning("too few cards")
    told = {"process": os.getpid(), "node": context.node_id, "of": context.node_config["num-partitions"]}
    told |= {"heard": os.environ.get("TOLD", ""), "imported": AHEAD in sys.modules, "dice": np.random.rand()}
    content = {
        "arrays": ArrayRecord({"count": Array(before + 1)}),
        "told": ConfigRecord(told),
        "given": ConfigRecord(context.run_config),
    }
    return Message(RecordDict(content), reply_to=message)


def cannot_begin():
    """What a worker is to call first, and cannot."""
    raise OSError("no room for the model")
