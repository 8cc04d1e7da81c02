"""Every figure of the course, drawn from plain tables; it imports no other room."""

from fedllm_helpers.plotting.diagrams import data_routes, flower_apps, lora_update, tokens
from fedllm_helpers.plotting.figures import by_round, byte_bars, curves, frontier, heat_maps, intervals, losses, pairs

__all__ = [
    "by_round",
    "byte_bars",
    "curves",
    "data_routes",
    "flower_apps",
    "frontier",
    "heat_maps",
    "intervals",
    "lora_update",
    "losses",
    "pairs",
    "tokens",
]
