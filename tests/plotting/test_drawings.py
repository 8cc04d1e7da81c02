"""Drawings fit their canvas and say in words what they show; a figure of data is told by its numbers."""

import base64
import io

import matplotlib
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import capture_output
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from fedllm_helpers import plotting  # noqa: E402
from fedllm_helpers.plotting import deployment, privacy, sketch  # noqa: E402

rng = np.random.default_rng(0)
MOVES = {f"hospital {k}": rng.normal(size=50) + 1 for k in range(6)}
WEIGHTS = rng.normal(size=64).tolist()
CARD = ["Question", ":", " What", " is", " Quad", "ruple", " gallop", " rhythm", "?", "\n", "Answer", ":"]
ANSWER = [" A", " type", " of", " gallop", " rhythm", " in", " which", " both", " the", " third", ".", "<|im_end|>"]
LEARNED = [False] * len(CARD) + [True] * len(ANSWER)


def some(count):
    return {name: MOVES[name] for name in list(MOVES)[:count]}


DRAWINGS = {
    "two_questions": plotting.two_questions,
    "next_token": lambda: plotting.next_token(
        ["?", "\n", "Answer", ":"], [" Ab", "norm", "ally", " short"], [1.7e-4, 0.0066, 0.68, 1.0]
    ),
    "pooled_training": plotting.pooled_training,
    "lora_update": lambda: plotting.lora_update(576, 192, 16),
    "levels": lambda: plotting.levels(WEIGHTS),
    "tokens": lambda: plotting.tokens(CARD + ANSWER, LEARNED, "One card: what is given, and what is learned"),
    "data_routes": plotting.data_routes,
    "federation": plotting.federation,
    "one_round": plotting.one_round,
    "wall": lambda: plotting.wall(120, 921_600, ("num-examples", "loss-before", "loss-after")),
    "flower_apps": plotting.flower_apps,
    "machines": plotting.machines,
    "moves": lambda: plotting.moves(some(4)),
    "two_means": plotting.two_means,
    "cross_terms": plotting.cross_terms,
    "rules": plotting.rules,
    "core": plotting.core,
    "who_sees_what": plotting.who_sees_what,
    "dropped_mask": plotting.dropped_mask,
    "one_card": plotting.one_card,
    "smaller_messages": plotting.smaller_messages,
}
VARIANTS = {  # other sizes that a reader may try
    "next_token of one": lambda: plotting.next_token([":"], [" pseudohypoparathyroidism"], [1e-5]),
    "pooled_training of 3": lambda: plotting.pooled_training(3),
    "lora_update of 7B": lambda: plotting.lora_update(4096, 11_008, 128),
    "levels of few": lambda: plotting.levels([1.0, -0.5]),
    "federation of 4": lambda: plotting.federation(4),
    "wall with one number": lambda: plotting.wall(2, 10, ("num-examples",)),
    "flower_apps of 2": lambda: plotting.flower_apps(2),
    "machines with 3 hospitals": lambda: plotting.machines(3),
    "who_sees_what of 8": lambda: plotting.who_sees_what(8),
    "one_card under little noise": lambda: plotting.one_card(0.25),
    "federation of 8": lambda: plotting.federation(8),
    "tokens with a long one": lambda: plotting.tokens(["x" * 90, " A"], [True, False], "title"),
    "core of 7B": lambda: plotting.core(14_336, 4096, 128),
    "moves of 1": lambda: plotting.moves(some(1)),
    "moves of unlike size": lambda: plotting.moves({"a": np.eye(3)[0], "b": 4 * np.eye(3)[0] + 1, "c": np.eye(3)[1]}),
    "opposite moves": lambda: plotting.moves({"a": np.eye(3)[0], "b": -0.5 * np.eye(3)[0]}),
    "moves of 2": lambda: plotting.moves(some(2)),
    "moves of 3": lambda: plotting.moves(some(3)),
    "moves of 5": lambda: plotting.moves(some(5)),
    "moves of 6": lambda: plotting.moves(some(6)),
}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("draw", [pytest.param(f, id=name) for name, f in (DRAWINGS | VARIANTS).items()])
def test_every_text_of_a_drawing_is_on_its_canvas_and_none_lies_on_another(draw):
    figure = draw()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts if text.get_text()]
    assert boxes
    for box in boxes:
        inside = figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1
        assert inside and figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1
    shrunk = [box.shrunk(0.9, 0.6).translated(0.05 * box.width, 0.2 * box.height) for box in boxes]
    assert not [1 for i, one in enumerate(shrunk) for other in shrunk[:i] if one.overlaps(other)]
    assert plotting.describe(figure) == figure.get_label() and len(figure.get_label()) > 40


SAYS = {  # what the words of a drawing name
    "two_questions": ["the public web", "by heart", "hospitals keep"],
    "next_token": ["·Ab 0.00017, norm 0.0066, ally 0.68, ·short 1", "\\n Answer"],
    "pooled_training": ["6 organ systems", "frozen", "held out"],
    "lora_update": ["W, 576 by 192", "B, 576 by 16", "A, 16 by 192", "12,288 numbers against 110,592"],
    "levels": ["24 weights", "of the 16 are used"],
    "tokens": ["One card", repr("".join(CARD)), repr("".join(ANSWER))],
    "data_routes": ["the vendor's model", "a cloud's GPU", "a server that averages"],
    "federation": ["6 hospitals", "No card crosses"],
    "one_round": ["1  send", "2  train", "3  return", "4  average"],
    "wall": ["120 arrays", "921,600 numbers", "num-examples, loss-before, loss-after"],
    "flower_apps": ["ServerApp", "Grid", "3 ClientApps"],
    "machines": ["port 8000", "port 9093", "2 hospitals", "could start runs"],
    "moves": ["hospital 0, hospital 1, hospital 2, hospital 3", "% as long"],
    "two_means": ["multiply, then average", "average, then multiply"],
    "cross_terms": ["B1 A1", "B2 A2", "B1 A2", "B2 A1"],
    "core": ["P R A", "LoRA sends 12,288 numbers, and a core has 256", "mean of R1 and R2"],
    "who_sees_what": ["4 hospitals", "every single one", "The average goes", "the last adapter"],
    "dropped_mask": ["a mask for each pair", "Hospital 2 goes away", "shares of its key"],
    "one_card": ["circle of radius C", "cut at the circle", "noise of 1 C", "overlap"],
    "smaller_messages": ["Fewer bits: every square is there", "only the darkest", "two thin strips", "stay at home"],
    "rules": ["FedIT: up BA", "FFA-LoRA: up B, down B", "FedSA-LoRA: up A, down A"],
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_the_words_of_a_drawing_name_what_is_drawn(name):
    said = plotting.describe(DRAWINGS[name]())
    assert [phrase for phrase in SAYS[name] if phrase not in said] == []


def test_a_unit_of_a_drawing_is_an_inch():
    figure, axes = sketch.canvas(7, 2.5, "words")
    assert figure.get_size_inches().tolist() == [7, 2.5] and (axes.get_xlim(), axes.get_ylim()) == ((0, 7), (0, 2.5))
    assert axes.get_window_extent().bounds == pytest.approx(figure.bbox.bounds)


def test_the_average_of_orthogonal_moves_goes_as_far_as_geometry_says():
    figure = plotting.moves({"a": np.array([1.0, 0.0, 0.0]), "b": np.array([0.0, 1.0, 0.0])})
    assert "71%" in figure.get_label() and any("71%" in text.get_text() for text in figure.axes[0].texts)
    ends = [note.xy[0] - 1.0 for note in figure.axes[0].texts if getattr(note, "arrow_patch", None)]
    assert ends == pytest.approx([6 * 0.5**0.5] * 3), "each of the two, and their average"


def test_a_chance_stands_above_each_token_of_the_answer():
    texts = DRAWINGS["next_token"]().axes[0].texts
    said = [text.get_text() for text in texts if text.get_text().startswith("p =")]
    assert said == ["p = 0.00017", "p = 0.0066", "p = 0.68", "p = 1"]
    middles = [text.get_position()[0] for text in texts if text.get_fontfamily() == ["monospace"]]
    arrows = [(arrow.xyann[0], arrow.xy[0]) for arrow in texts if getattr(arrow, "arrow_patch", None)]
    assert arrows == [(middles[place - 1], middles[place]) for place in range(4, 8)], "each from the token before"


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
    assert [text.get_text() for text in figure.axes[0].texts] == ["+0.20", "-0.10"]
    colours = [to_hex(group[0].get_color()) for group in figure.axes[0].containers]
    assert colours == [plotting.figures.ARMS[arm][0] for arm in table["arm"]]
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


def test_an_arm_is_told_where_a_legend_shows_it():
    """One arm alone has no legend, and its colour may be borrowed for rows with other names."""
    one = pd.DataFrame({"label": ["a", "b"], "arm": "pooled", "value": 2.0, "low": 1.0, "high": 3.0})
    said = plotting.describe(plotting.intervals(one, "nats", "title"))
    assert said == "title, x: nats. a: 2 from 1 to 3. b: 2 from 1 to 3."
    two = plotting.describe(plotting.intervals(pd.concat([one, one.assign(arm="untuned")]), "nats", "title"))
    assert "a, pooled: 2 from 1 to 3" in two and "b, untuned: 2 from 1 to 3" in two


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_cells_are_told_by_names_that_inner_panels_hide(panels):
    table = pd.DataFrame([[1, 2], [3, 4]], index=["a", "b"], columns=["eye", "ear"])
    said = plotting.describe(plotting.heat_maps({f"way {n}": table for n in range(panels)}, "cards", "title"))
    cells = "a, eye: 1. a, ear: 2. b, eye: 3. b, ear: 4"
    assert said == "title. " + ". ".join(f"way {n}. {cells}" for n in range(panels)) + ". y: cards."


ROWS = pd.DataFrame(
    [("eye", "untuned", 3.1, 3.05, 3.3), ("ear", "pooled", 2.4, 2.2, 2.5)],
    columns=["label", "arm", "value", "low", "high"],
)
BOTH = pd.concat([ROWS.assign(arm=arm, value=ROWS["value"] + 0.01 * k) for k, arm in enumerate(("untuned", "pooled"))])
CELLS = pd.DataFrame([[1.0, 2.5], [4.0, -3.0]], index=["a", "b"], columns=["eye", "ear"])
SENT = pd.DataFrame(
    [("int8", 0.9, 0.001, -0.01, 0.012), ("top 1 %", 0.02, 0.3, 0.2, 0.4)],
    columns=["label", "megabytes", "value", "low", "high"],
)
RANKS = pd.DataFrame({"rank": [1, 4, 1, 4], "mb": [1.0, 4.0, 2.0, 8.0], "model": ["small", "small", "large", "large"]})
LAYERS = pd.DataFrame(
    [
        (partition, 1, f"model.layers.{block}.self_attn.q_proj", error + block)
        for partition, error in (("by specialty", 0.25), ("IID", 0.75))
        for block in range(3)
    ],
    columns=["partition", "round", "layer", "error"],
)
LOSSES = pd.DataFrame({"step": range(1, 51), "loss": np.linspace(3, 2, 50)})
PAIRS = pd.DataFrame({"label": ["Hamlet"], "passage": [2.5], "paraphrase": [40.0]})
ROUNDS = pd.DataFrame({"round": [0, 1], "nll": [3.0, 2.5]})
PARTS = pd.DataFrame({"import": [5.0, 0.0], "train": [2.0, 4.0]}, index=["deployed", "in one process"])


SIZES = pd.DataFrame(
    [
        ("LoRA", "1", 100.0, 0.1, 0.05, 0.2),
        ("LoRA", "4", 400.0, 0.0, -0.1, 0.1),
        ("LoRA-XS", "16", 60.0, 0.15, 0.1, 0.3),
    ],
    columns=["family", "label", "kilobytes", "value", "low", "high"],
)
TOLD = [  # what is drawn, and what its words hold
    (
        "intervals",
        lambda: plotting.intervals(ROWS, "nats", "title"),
        ["title, x: nats", "eye, untuned: 3.1 from 3.05 to 3.3"],
    ),
    ("pairs", lambda: plotting.pairs(PAIRS, "passage", "paraphrase", "x", "t"), ["passage: Hamlet 2.5", "Hamlet 40"]),
    (
        "card_by_card",
        lambda: plotting.card_by_card({"one": np.arange(4.0), "other": np.arange(4.0) + [0, 0.2, 0, 0.2]}, "nats", "t"),
        ["t. each card under both models, y: nats", "other minus one: at 0.5, 0.1 from -0.0155 to 0.215"],
    ),
    ("byte_sizes", lambda: plotting.byte_sizes({"one": 1_500_000, "two": 27_000_000}, "t"), ["one 1.5, two 27"]),
    (
        "by_round",
        lambda: plotting.by_round({"federated": ROUNDS}, "nats", "title", {"pooled": 2.4}),
        ["title", "y: nats", "federated: (0, 3), (1, 2.5)", "pooled: (0, 2.4)"],
    ),
    ("losses", lambda: plotting.losses({"pooled": LOSSES}, "t", window=1), ["pooled: (1, 3), (50, 2)."]),
    (
        "heat_maps",
        lambda: plotting.heat_maps({"one": CELLS, "two": CELLS * 2}, "cards", "t"),
        ["t. one. a, eye: 1. a, ear: 2.5. b, eye: 4. b, ear: -3", "two. a, eye: 2. a, ear: 5"],
    ),
    ("differences", lambda: plotting.differences(CELLS, {}, "nats", "t"), ["a, ear: 2.5", "b, ear: -3"]),
    (
        "budgets",
        lambda: plotting.budgets({"work": ROWS, "examples": ROWS.assign(low=1)}, "nats", "t"),
        ["work", "eye: 3.1 from 3.05 to 3.3", "examples", "eye: 3.1 from 1 to 3.3"],
    ),
    (
        "cost_to_target",
        lambda: plotting.cost_to_target(
            pd.DataFrame({"arm": ["a", "a", "b"], "megabytes": [0.05, 0.1, 2.0], "nll": [3.0, 2.5, 2.6]}), 2.55, "t"
        ),
        ["a: (0.05, 3), (0.1, 2.5)", "b: (2, 2.6)", "dashed at 2.55: the target"],
    ),
    (
        "on_lines",
        lambda: plotting.on_lines(
            pd.DataFrame({"sent": ["a", "a"], "megabits": [2, 20], "seconds": [46.0, 10.8], "formula": [29.7, 2.97]}),
            "t",
        ),
        ["a: (2, 46), (20, 10.8)", "a, formula: (2, 29.7), (20, 2.97)"],
    ),
    (
        "bill",
        lambda: privacy.bill(ROWS.assign(measure="bits"), {}, "t"),
        ["x: bits. eye: 3.1 from 3.05 to 3.3. ear: 2.4 from 2.2 to 2.5"],
    ),
    (
        "errors_by_layer",
        lambda: plotting.errors_by_layer(LAYERS, "t"),
        ["by specialty", "q_proj, round 1: (0, 0.25), (1, 1.25), (2, 2.25)", "IID", "(0, 0.75), (1, 1.75), (2, 2.75)"],
    ),
    (
        "frontier",
        lambda: plotting.frontier(SENT, "MB", "nats", "t", 0.02),
        ["int8", "0.9", "0.001", "-0.01", "0.012", "top 1 %", "0.02", "0.3", "0.2", "0.4"],
    ),
    (
        "curves",
        lambda: plotting.curves(RANKS, "rank", "mb", "model", xlabel="x", ylabel="y", title="t"),
        ["small: (1, 1), (4, 4)", "large: (1, 2), (4, 8)"],
    ),
    (
        "roc",
        lambda: privacy.roc({"pooled": (np.array([0, 0.1, 1]), np.array([0, 0.4, 1]))}, "t"),
        ["pooled: (0, 0), (0.1, 0.4), (1, 1)"],
    ),
    (
        "heat_maps",
        lambda: plotting.heat_maps({"one": CELLS.set_axis([0, 1])}, "cards", "t"),
        ["eye: 1", "ear: 2.5", "eye: 4", "ear: -3"],
    ),
    (
        "intervals",
        lambda: plotting.intervals(BOTH, "nats", "t"),
        ["untuned", "pooled", "eye", "3.1 ", "3.11 "],
    ),
    (
        "intervals",
        lambda: plotting.intervals(ROWS, "nats", "t", {"chance": 1.5}),
        ["chance", "1.5"],
    ),
    (
        "curves",
        lambda: plotting.curves(
            RANKS, "rank", "mb", "model", xlabel="x", ylabel="y", title="t", references={"a day": 5.5}
        ),
        ["large: (1, 2), (4, 8)", "a day", "5.5"],
    ),
    (
        "families",
        lambda: plotting.families(SIZES, "kilobytes", "nats", "t"),
        ["LoRA: at 400, 0 from -0.1 to 0.1", "LoRA-XS: at 60, 0.15 from 0.1 to 0.3"],
    ),
    (
        "lines",
        lambda: plotting.lines({"server": pd.Series([3.0, 2.5], index=[0, 2])}, "nats", "t"),
        ["server: (0, 3), (2, 2.5)", "round"],
    ),
    (
        "bill",
        lambda: privacy.bill(ROWS.assign(measure="bits"), {"bits": {"chance": 1.5}}, "t"),
        ["x: bits", "chance", "1.5"],
    ),
    (
        "stacked",
        lambda: deployment.stacked(PARTS, "seconds", "t"),
        ["import", "train", "deployed", "5", "2", "in one process", "4"],
    ),
]


NAMES = [one[0] for one in TOLD]


@pytest.mark.parametrize(("name", "draw", "phrases"), TOLD, ids=NAMES)
def test_data_are_told_by_their_names_and_numbers(name, draw, phrases):
    said = plotting.describe(draw())
    assert [phrase for phrase in phrases if phrase not in said] == [], said
    assert "_nolegend_" not in said and "mathdefault" not in said, said


def test_an_axis_of_bytes_has_a_name_of_its_own_at_every_tick():
    """0.05 and 0.1 are not both 0.1."""
    table = pd.DataFrame({"arm": "a", "megabytes": [0.012, 0.3, 40.0], "nll": [3.0, 2.5, 2.4]})
    figure = plotting.cost_to_target(table, 2.45, "t")
    figure.draw_without_rendering()
    names = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert {"0.02", "0.05", "0.1", "10"} <= set(names) and len(set(names)) == len(names)


def test_every_figure_and_drawing_of_the_room_is_tried_here():
    assert set(plotting.__all__) - {"show", "describe"} <= set(DRAWINGS) | set(NAMES) and set(SAYS) == set(DRAWINGS)


@pytest.mark.parametrize("draw", [plotting.one_round, TOLD[0][1]], ids=["a drawing", "data"])
def test_a_shown_figure_is_a_picture_with_its_words_and_is_closed(draw):
    """As a kernel does it; the shell is taken away again."""
    figure = draw()
    words, size = plotting.describe(figure), figure.get_size_inches()
    select_figure_formats(InteractiveShell.instance(), {"png"})
    try:
        with capture_output() as shown:
            plotting.show(figure)
    finally:
        InteractiveShell.clear_instance()
    (output,) = shown.outputs
    assert output.metadata == {"image/png": {"alt": words}} and len(words) > 40
    picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
    assert picture.format == "PNG" and picture.width / picture.height == pytest.approx(size[0] / size[1], rel=0.2)
    assert not plt.fignum_exists(figure.number)


def test_words_are_marked_where_they_are_right_and_told_with_their_mark():
    figure = privacy.words({"eye": [("lens", True), ("$", False), ("third", True)], "ear": []}, "Words", shown=2)
    texts = {text.get_text(): text.get_weight() for text in figure.axes[0].texts}
    assert texts == {"eye": "bold", "✓ lens": "bold", r"· \$": "normal", "ear": "bold"}
    assert plotting.describe(figure) == "Words. eye: lens ✓, $. ear: ."
