"""Every figure of the course, drawn from plain tables, and every drawing; it imports no other room."""

from fedllm_helpers.plotting.aggregation import core, cross_terms, errors_by_layer, rules, two_means
from fedllm_helpers.plotting.analysis import card_by_card, smaller_messages
from fedllm_helpers.plotting.comparisons import budgets, cost_to_target, differences, families, lines
from fedllm_helpers.plotting.defences import dropped_mask, one_card, who_sees_what
from fedllm_helpers.plotting.deployment import machines, on_lines
from fedllm_helpers.plotting.diagrams import levels, lora_update, next_token, pooled_training, tokens, two_questions
from fedllm_helpers.plotting.federations import data_routes, federation, flower_apps, moves, one_round, wall
from fedllm_helpers.plotting.figures import by_round, byte_sizes, curves, frontier, heat_maps, intervals, losses, pairs
from fedllm_helpers.plotting.showing import describe, show

__all__ = [
    "budgets",
    "by_round",
    "byte_sizes",
    "card_by_card",
    "core",
    "cost_to_target",
    "cross_terms",
    "curves",
    "data_routes",
    "describe",
    "differences",
    "dropped_mask",
    "errors_by_layer",
    "families",
    "federation",
    "flower_apps",
    "frontier",
    "heat_maps",
    "intervals",
    "levels",
    "lines",
    "lora_update",
    "losses",
    "machines",
    "moves",
    "next_token",
    "one_card",
    "on_lines",
    "one_round",
    "pairs",
    "pooled_training",
    "rules",
    "show",
    "smaller_messages",
    "tokens",
    "two_means",
    "two_questions",
    "wall",
    "who_sees_what",
]
