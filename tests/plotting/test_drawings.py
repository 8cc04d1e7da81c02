"""Drawings fit their canvas and say in words what they show; a figure of data is told by its numbers."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from fedllm_helpers import plotting  # noqa: E402
from fedllm_helpers.plotting import showing  # noqa: E402

rng = np.random.default_rng(0)
MOVES = {f"hospital {k}": rng.normal(size=50) + 1 for k in range(4)}
DRAWINGS = {
    "two_questions": plotting.two_questions,
    "next_token": lambda: plotting.next_token(["?", "\n", " Answer", ":"], [" Ab", "norm", "ally"], [0.1, 0.9, 1.0]),
    "pooled_training": plotting.pooled_training,
    "lora_update": lambda: plotting.lora_update(576, 192, 16),
    "levels": lambda: plotting.levels(rng.normal(size=64)),
    "tokens": lambda: plotting.tokens([" What", "?", " A"], [False, False, True], "One card"),
    "data_routes": plotting.data_routes,
    "federation": plotting.federation,
    "one_round": plotting.one_round,
    "wall": lambda: plotting.wall(120, 921_600, ("num-examples", "loss-before", "loss-after")),
    "flower_apps": plotting.flower_apps,
    "moves": lambda: plotting.moves(MOVES),
    "two_means": plotting.two_means,
    "cross_terms": plotting.cross_terms,
    "rules": plotting.rules,
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_text_of_a_drawing_is_on_its_canvas_and_none_lies_on_another(name):
    figure = DRAWINGS[name]()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts if text.get_text()]
    assert boxes
    for box in boxes:
        inside = figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
        assert inside and figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1
    shrunk = [box.shrunk(0.9, 0.6).translated(0.05 * box.width, 0.2 * box.height) for box in boxes]
    assert not [1 for i, one in enumerate(shrunk) for other in shrunk[:i] if one.overlaps(other)]
    assert plotting.describe(figure) == figure.get_label() and len(figure.get_label()) > 40


def test_every_drawing_of_the_room_is_tried_here():
    data = {"budgets", "by_round", "byte_sizes", "curves", "differences", "errors_by_layer", "frontier", "heat_maps"}
    data |= {"intervals", "losses", "pairs"}
    assert set(plotting.__all__) - {"show", "describe"} == set(DRAWINGS) | data


def test_the_average_of_orthogonal_moves_goes_as_far_as_geometry_says():
    figure = plotting.moves({"a": np.array([1.0, 0.0, 0.0]), "b": np.array([0.0, 1.0, 0.0])})
    assert "71%" in figure.get_label() and any("71%" in text.get_text() for text in figure.axes[0].texts)
    ends = [note.xy[0] - 1.0 for note in figure.axes[0].texts if getattr(note, "arrow_patch", None)]
    assert ends == pytest.approx([6 * 0.5**0.5] * 3), "each of the two, and their average"


def test_a_chance_stands_above_each_token_of_the_answer():
    figure = DRAWINGS["next_token"]()
    said = [text.get_text() for text in figure.axes[0].texts if text.get_text().startswith("p =")]
    assert said == ["p = 0.1", "p = 0.9", "p = 1"]
    assert "·Ab 0.1, norm 0.9, ally 1" in figure.get_label()


def test_levels_join_each_weight_to_the_nearest_of_sixteen():
    weights = np.array([-1.0, -0.5, 0.03, 1.0])
    lines = [line for line in plotting.levels(weights).axes[0].lines if len(line.get_xdata()) == 2]
    slanted = [line.get_xdata() for line in lines if line.get_ydata()[0] == 1.25]
    tops, feet = (np.array([line[end] for line in slanted]) for end in (0, 1))
    assert np.allclose((tops - 4.5) / 4, weights)
    assert np.allclose((feet - 4.5) / 4, np.round((weights + 1) * 7.5) / 7.5 - 1)


def test_budgets_draw_each_difference_with_its_interval():
    table = pd.DataFrame(
        [("one hospital", "one hospital", 0.2, 0.1, 0.3), ("pooled", "pooled", -0.1, -0.2, 0.0)],
        columns=["label", "arm", "value", "low", "high"],
    )
    figure = plotting.budgets(
        {"work": table, "examples": table.assign(value=-table["value"], low=-table["high"], high=-table["low"])},
        "nats",
        "title",
    )
    for axes, sign in zip(figure.axes, (1, -1), strict=True):
        assert [float(group[0].get_xdata()[0]) for group in axes.containers] == [0.2 * sign, -0.1 * sign]
    ends = [group[2][0].get_segments()[0][:, 0].tolist() for group in figure.axes[0].containers]
    assert np.allclose(ends, table[["low", "high"]])
    assert "one hospital: 0.2 from 0.1 to 0.3. pooled: -0.1 from -0.2 to 0" in plotting.describe(figure)
    assert plotting.describe(figure).count("one hospital") == 2, "the second panel has the names of the first"


def test_differences_are_white_at_zero_and_boxed_where_told():
    table = pd.DataFrame([[0.0, 0.4], [-0.1, 0.2]], index=["a", "b"], columns=["eye", "ear"])
    figure = plotting.differences(table, {"a": "ear", "b": "eye"}, "nats", "title")
    axes = figure.axes[0]
    (image,) = axes.images
    assert image.get_clim() == (-0.4, 0.4) and to_hex(image.cmap(image.norm(0.0))) in ("#f7f6f6", "#f6f7f7", "#f7f7f7")
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle) and not patch.get_fill()]
    centres = [(box.get_x() + box.get_width() / 2, box.get_y() + box.get_height() / 2) for box in boxes]
    assert np.allclose(centres, [(1, 0), (0, 1)])
    assert [text.get_text() for text in axes.texts] == ["+0.00", "+0.40", "-0.10", "+0.20"]
    assert "a, ear: 0.4" in plotting.describe(figure)


def test_data_are_told_by_their_numbers():
    pairs = pd.DataFrame({"label": ["Hamlet"], "passage": [2.5], "paraphrase": [40.0]})
    assert "passage: Hamlet 2.5. paraphrase: Hamlet 40" in plotting.describe(
        plotting.pairs(pairs, "passage", "paraphrase", "x", "t")
    )
    assert "megabytes: one 1.5, two 27" in plotting.describe(
        plotting.byte_sizes({"one": 1_500_000, "two": 27_000_000}, "t")
    )
    table = pd.DataFrame({"round": [0, 1], "nll": [3.0, 2.5]})
    said = plotting.describe(plotting.by_round({"federated": table}, "nats", "title", {"pooled": 2.4}))
    assert "title" in said and "y: nats" in said and "federated: (0, 3), (1, 2.5)" in said
    long = pd.DataFrame({"step": range(1, 51), "loss": np.linspace(3, 2, 50)})
    said = plotting.describe(plotting.losses({"pooled": long}, "t", window=1))
    assert "pooled: (1, 3), (50, 2)" in said, "of many points the first and the last"


def test_a_shown_figure_carries_its_words_and_is_closed(monkeypatch):
    figure = plotting.one_round()
    shown = []
    monkeypatch.setattr(showing, "display", lambda what, metadata: shown.append((what, metadata)))
    plotting.show(figure)
    assert shown == [(figure, {"image/png": {"alt": figure.get_label()}})] and not plt.fignum_exists(figure.number)
