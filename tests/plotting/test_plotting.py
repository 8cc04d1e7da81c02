"""Figures are tested on the data they drew; how they look was judged by eye."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")


from fedllm_helpers import plotting  # noqa: E402
from fedllm_helpers.plotting import deployment as plotting_deployment  # noqa: E402  (the backend first)
from fedllm_helpers.plotting import federations, figures


@pytest.fixture
def table():
    rows = [("eye", "untuned", 3.1, 3.0, 3.3), ("eye", "pooled", 2.4, 2.2, 2.5), ("ear", "untuned", 2.9, 2.7, 3.0)]
    return pd.DataFrame(rows, columns=["label", "arm", "value", "low", "high"])


def test_intervals_draw_every_value_with_its_bounds(table):
    axes = figures.intervals(table, "nats", "title", {"chance": 1.5}).axes[0]
    for container, arm in zip(axes.containers, ("untuned", "pooled"), strict=True):
        rows = table[table["arm"] == arm]
        assert np.allclose(container[0].get_xdata(), rows["value"])
        bars = np.array([segment[:, 0] for segment in container[2][0].get_segments()])
        assert np.allclose(bars, rows[["low", "high"]])
        assert container[0].get_color() == figures.ARMS[arm][0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["eye", "ear"]
    assert any(np.allclose(line.get_xdata(), 1.5) for line in axes.lines)
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row stands on top"


def test_losses_draw_steps_and_their_running_mean():
    history = pd.DataFrame({"step": range(1, 11), "loss": np.arange(10, 0, -1.0)})
    raw, mean = figures.losses({"pooled": history}, "title", window=2).axes[0].lines
    assert np.allclose(raw.get_ydata(), history["loss"]) and np.allclose(
        mean.get_ydata()[1:], history["loss"][1:] + 0.5
    )


def test_pairs_and_bytes_draw_what_they_were_given():
    table = pd.DataFrame({"label": ["a", "b"], "passage": [2.0, 3.0], "paraphrase": [40.0, 50.0]})
    axes = figures.pairs(table, "passage", "paraphrase", "x", "t").axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[2.0, 3.0], [40.0, 50.0]] and axes.get_xscale() == "log"
    axes = figures.byte_sizes({"one": 1_500_000, "two": 27_000_000_000}, "t").axes[0]
    assert list(axes.lines[0].get_xdata()) == [1.5, 27000.0] and not axes.patches, "no bars on a logarithmic axis"
    assert {text.get_text() for text in axes.texts} == {"1.5 MB", "27.0 GB"}


def test_only_the_federated_route_keeps_records_inside():
    (axes,) = federations.data_routes().axes
    seen = [text.get_position()[0] for text in axes.texts if "records seen here" in text.get_text()]
    assert len(seen) == 2 and max(seen) < 6, "the third panel begins at six inches"


def test_arms_differ_in_colour_and_mark_and_style_stays_local():
    colours, marks = zip(*figures.ARMS.values(), strict=True)
    assert len(set(colours)) == len(colours) and len(set(marks)) == len(marks)
    before = dict(matplotlib.rcParams)
    federations.data_routes()
    assert dict(matplotlib.rcParams) == before


def test_heat_maps_write_every_number_where_it_belongs():
    table = pd.DataFrame([[1.0, 2.5], [4.0, 3.0]], index=["a", "b"], columns=["eye", "ear"])
    figure = figures.heat_maps({"one": table, "two": table * 2}, "cards", "t", digits=1)
    first, second = figure.axes[:2]
    assert [text.get_text() for text in first.texts] == ["1.0", "2.5", "4.0", "3.0"]
    assert np.array_equal(second.images[0].get_array(), table * 2)
    assert first.images[0].get_clim() == second.images[0].get_clim() == (1.0, 8.0), "one scale for all panels"
    assert [text.get_text() for text in second.get_xticklabels()] == ["eye", "ear"]


def test_by_round_draws_the_measure_and_its_references():
    table = pd.DataFrame({"round": [0, 1, 2], "nll": [3.0, 2.6, 2.5]})
    axes = figures.by_round({"federated": table}, "nats", "t", {"pooled": 2.4}).axes[0]
    curve, reference = axes.lines
    assert list(curve.get_ydata()) == [3.0, 2.6, 2.5] and set(reference.get_ydata()) == {2.4}
    assert curve.get_color() == figures.ARMS["federated"][0] != reference.get_color()


def test_the_frontier_draws_each_setting_and_the_band():
    rows = [("int8", 0.9, 0.001, -0.01, 0.01), ("top 1 %", 0.02, 0.3, 0.2, 0.4)]
    table = pd.DataFrame(rows, columns=["label", "megabytes", "value", "low", "high"])
    axes = figures.frontier(table, "x", "y", "t", 0.02).axes[0]
    assert [float(c[0].get_xdata()[0]) for c in axes.containers] == [0.9, 0.02] and axes.get_xscale() == "log"
    bars = [c[2][0].get_segments()[0][:, 1] for c in axes.containers]
    assert np.allclose(bars, table[["low", "high"]])
    faces = [c[0].get_markerfacecolor() for c in axes.containers]
    assert faces[0] != "white" and faces[1] == "white", "within the band, and above it"
    assert (axes.patches[0].get_y(), axes.patches[0].get_height()) == pytest.approx((-0.02, 0.04))


def test_curves_draw_a_line_per_name_and_their_references():
    table = pd.DataFrame({"rank": [1, 4, 1, 4], "bytes": [1.0, 4.0, 2.0, 8.0], "model": ["a", "a", "b", "b"]})
    axes = figures.curves(table, "rank", "bytes", "model", xlabel="x", ylabel="y", title="t", references={"day": 5.0})
    first, second, day = axes.axes[0].lines
    assert list(first.get_ydata()) == [1.0, 4.0] and list(second.get_ydata()) == [2.0, 8.0]
    assert set(day.get_ydata()) == {5.0} and first.get_color() != second.get_color()


def test_errors_by_layer_draw_a_line_per_projection_and_round():
    name = "base_model.model.model.layers.{}.self_attn.{}"
    rows = [
        (partition, number, name.format(block, projection), 0.1 * block + number)
        for partition in ("by specialty", "IID")
        for number in (1, 2)
        for block in range(12)
        for projection in ("q_proj", "v_proj")
    ]
    table = pd.DataFrame(rows, columns=["partition", "round", "layer", "error"])
    figure = plotting.errors_by_layer(table, "title")
    for axes in figure.axes:
        assert len(axes.lines) == 4 and axes.get_ylim()[0] == 0
        first, second = axes.lines[:2]
        assert np.allclose(first.get_xdata(), range(12)) and np.allclose(first.get_ydata(), 0.1 * np.arange(12) + 1)
        assert np.allclose(second.get_ydata(), 0.1 * np.arange(12) + 2)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["q_proj, round 1", "q_proj, round 2", "v_proj, round 1", "v_proj, round 2"]


def test_stacked_bars_lie_one_after_the_other():
    table = pd.DataFrame({"import": [5.0, 0.0], "train": [2.0, 4.0]}, index=["deployed", "in one process"])
    (axes,) = plotting_deployment.stacked(table, "seconds", "title").axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 5), (0, 0), (5, 2), (0, 4)]
    assert [text.get_text() for text in axes.texts] == ["5.0", "2.0", "4.0"], "none where nothing is"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["import", "train"]


def test_tokens_are_drawn_as_they_are_learned():
    pieces, learned = ["###", " Question", ":", " a", "\n", " long" * 30], [False, False, False, True, True, True]
    axes = plotting.tokens(pieces, learned, "title").axes[0]
    kinds = [patch.get_gid() for patch in axes.patches]
    assert kinds[:-2] == ["learned" if one else "given" for one in learned] and kinds[-2:] == ["given", "learned"]
    assert [text.get_text() for text in axes.texts][2:6] == ["·Question", ":", "·a", "\\n"]


def test_drawings_say_the_sizes_that_they_were_given():
    said = " ".join(text.get_text() for text in plotting.lora_update(576, 192, 16).axes[0].texts)
    assert "576 × 192" in said and "576 × 16" in said and "16 × 192" in said and f"{16 * (576 + 192):,}" in said
    texts = [text.get_text() for text in plotting.flower_apps(4).axes[0].texts]
    assert texts.count("ClientApp") == 4 and texts.count("ServerApp") == 1


def test_the_mean_of_differences_is_drawn_with_its_own_interval():
    easy = np.linspace(1, 5, 16)
    figure = plotting.card_by_card({"one": easy, "other": easy + np.tile([0.1, 0.3], 8)}, "nats per token", "title")
    left, right = figure.axes
    bars = {group.get_label(): group for axes in (left, right) for group in axes.containers}
    ends = {name: np.ptp(group[2][0].get_segments()[0][:, 1]) for name, group in bars.items()}
    assert ends["one"] == pytest.approx(4 * easy.std(ddof=1) / 4) and ends["other minus one"] < ends["one"] / 10
    assert float(bars["other minus one"][0].get_ydata()[0]) == pytest.approx(0.2)
    assert "other minus one: at 0.5, 0.2 from 0.148 to 0.252" in plotting.describe(figure)
