"""Every figure of the course, drawn from plain tables; it imports no other room."""

from fedllm_helpers.plotting.figures import by_round, byte_bars, curves, frontier, heat_maps, intervals, losses, pairs

__all__ = ["by_round", "byte_bars", "curves", "frontier", "heat_maps", "intervals", "losses", "pairs"]
