"""Federations of the rules on adapters of two small layers: no language model."""

import numpy as np
import tiny
from flwr.app import Message, MetricRecord, RecordDict
from omegaconf import OmegaConf

from fedllm_helpers.adapters import factors
from fedllm_helpers.adapters.records import from_record, to_record
from fedllm_helpers.aggregation import edits, rules
from fedllm_helpers.config.runs import settings
from fedllm_helpers.federation import server_app
from fedllm_helpers.federation.chain import compose
from fedllm_helpers.grids import in_process

RANK, SHAPES = 4, {"m.q": (11, 7), "m.v": (5, 9)}
LORA = ["model.lora.peft_lora_r=4", "model.lora.peft_lora_alpha=12"]


def first(cfg=None):
    """A start as PEFT makes it: A random, B zero; for LoRA-XS cores of zeros."""
    if cfg is not None and cfg.model.lora.core:
        return {f"{layer}.lora_B.core.weight": np.zeros((RANK, RANK), np.float32) for layer in SHAPES}
    rng, made = np.random.default_rng(0), {}
    for layer, (outputs, inputs) in SHAPES.items():
        made[f"{layer}.lora_A.weight"] = rng.normal(size=(RANK, inputs)).astype(np.float32)
        made[f"{layer}.lora_B.weight"] = np.zeros((outputs, RANK), np.float32)
    return made


def step(adapter, hospital, number, moved=None):
    """What a hospital makes of an adapter: a pseudo-random step on what it may move, zero where a rank is missing."""
    rng, made = np.random.default_rng([hospital, number]), {}
    for key, value in adapter.items():
        drawn = rng.normal(0.1 * hospital, 1, value.shape).astype(np.float32)
        made[key] = value + drawn if moved is None or any(part in key for part in moved) else value
    return made


def client(faults=None, seen=None):
    """A hospital as the package's, without a language model; ``seen`` collects what it added to its base model."""

    def app(message, context):
        hospital, hospitals = context.node_config["partition-id"], context.node_config["num-partitions"]
        numbers = {"partition-id": hospital, "num-partitions": hospitals, "num-examples": 10 * (hospital + 1)}
        if message.metadata.message_type.startswith("query"):
            return Message(RecordDict({"metrics": MetricRecord(numbers)}), reply_to=message)
        adapter, number = from_record(message.content["arrays"]), int(message.content["config"]["server-round"])
        if seen is not None:
            seen.append((message.metadata.message_type, number, hospital, adapter, edits.edit_of(message)))
        if message.metadata.message_type == "evaluate":
            return Message(RecordDict({"metrics": MetricRecord(numbers | {"nll": 1.0})}), reply_to=message)
        if (number, hospital) in (faults or ()):
            raise OSError("the power is gone")
        ranks = settings(context).federation.ranks
        moved = step(adapter, hospital, number, rules.trained(message))
        trained = factors.padded(factors.cut(moved, ranks[hospital] if ranks else RANK), RANK)
        numbers |= {"examples": 8, "tokens": 80, "seconds": 0.0, "loss-before": 3.0, "loss-after": 2.0}
        records = {"arrays": to_record(trained), "metrics": MetricRecord(numbers)}
        return Message(RecordDict(records), reply_to=message)

    return lambda message, context: rules.mod(message, context, app)


def plan(rule, *more, hospitals=3, rounds=3):
    return tiny.settings(*LORA, f"federation.aggregation={rule}", *more, hospitals=hospitals, rounds=rounds)


def federate(cfg, app=None, grid=in_process.InProcessGrid, **options):
    """(adapter, tables, edits of the base model)."""
    chain = compose(cfg)
    with grid(app or client(), cfg.federation.num_clients, {"config": OmegaConf.to_yaml(cfg)}) as nodes:
        return *server_app.federate(nodes, cfg, first(cfg), server_app.Options(**options), chain=chain), chain.rule.base
