"""A run in one HTML file that needs nothing else: at the server for everybody, at a hospital for itself."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment
from markupsafe import Markup
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from fedllm_helpers import folders, plotting
from fedllm_helpers.evaluation import at_home
from fedllm_helpers.federation.run_folders import ORIGIN
from fedllm_helpers.site import kept

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.used { background: #d9efe3; } .missed { background: #f6d9c2; }
.wide { overflow-x: auto; } img { max-width: 100%; } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
</style></head><body><h1>{{ title }}</h1>
<table>{% for name, value in facts.items() %}<tr><th scope="row">{{ name }}</th>
<td>{{ value }}</td></tr>{% endfor %}</table>
{% for heading, text, picture, alt, table in parts %}<h2>{{ heading }}</h2>{% if text %}<p>{{ text }}</p>{% endif %}
{% if picture %}<img src="data:image/png;base64,{{ picture }}" alt="{{ alt }}">{% endif %}
{% if table is not none %}<div class="wide">{{ table }}</div>{% endif %}{% endfor %}
{% if settings %}<h2>Settings</h2><pre>{{ settings }}</pre>{% endif %}
{% if versions %}<h2>Versions</h2><p>{{ versions }}</p>{% endif %}</body></html>
"""
Part = tuple[str, str, str, str, Any]


def write(folder: str | Path, target: str | Path | None = None) -> Path:
    """Write the report of a run's folder, or of the folder that a hospital's node has as ``report``.

    Returns:
        The file: ``report.html`` in the folder, unless another is named.

    Raises:
        FileNotFoundError: the folder is neither.
        ValueError: a file in it is damaged.
    """
    folder = Path(folder).expanduser()
    if (folder / at_home.FILE).is_file() and not (folder / ORIGIN).is_file():
        page = _of_hospital(folder)
    else:
        page = _of_run(kept.read(folder))
    target = Path(target).expanduser() if target else folder / "report.html"
    folders.write(target, page)
    return target


def _of_run(run: kept.Kept) -> str:
    rounds, clients, how = run.rounds, run.clients, run.origin["config"]["federation"]
    last = run.history.dropna(subset=["nll"]).tail(1)
    facts = {
        "model": run.origin["config"]["model"]["name"],
        "date": run.origin["date"],
        "rounds": f"{len(rounds)} of {how['num_rounds']}",
        "hospitals": how["num_clients"],
        "rule": f"{how['aggregation']}, {how['strategy']}",
        "sent": f"{rounds['bytes_up'].sum() / 1e6:,.1f} MB up, {rounds['bytes_down'].sum() / 1e6:,.1f} MB down",
        "seconds": f"{rounds['seconds'].sum():,.0f}",
        "held-out NLL at the end": f"{last['nll'].iloc[0]:.3f} nats per token" if len(last) else "not scored",
        "privacy promised": run.promised(),
    }
    parts = [_part("Round by round", _curves(run), "Nats per answer token; lower is better.")]
    if len(run.scores):
        table = run.scores.pivot_table(index="client", columns="round", values="nll")
        said = "The average on each hospital's own held-out cards. One whose numbers rise loses by taking part."
        if (noise := run.scores["noise"].max()) > 0:
            said += f" They are means over cards, with noise of a standard deviation of up to {noise:.2g}."
        parts.append(
            ("Hospital by hospital", said, "", "", _html(table.round(3).rename_axis(columns=None), "hospital"))
        )
    said = "Bytes and seconds of every round are in history.csv, those of every hospital in clients.csv."
    parts.append(("Who took part", said, "", "", _attendance(clients)))
    versions = ", ".join(f"{name} {number}" for name, number in run.origin["versions"].items() if number)
    return _page(f"Federation in {run.folder.name}", facts, parts, run.origin["config"], versions)


def _of_hospital(folder: Path) -> str:
    try:
        table = pd.read_csv(folder / at_home.FILE, dtype={"run": str})
        last = table.groupby("run", sort=False).tail(1)
        facts = {"runs": table["run"].nunique(), "rounds": len(table), "held-out cards": int(last["cards"].iloc[-1])}
        columns = [name for name in at_home.COLUMNS[3:] if table[name].notna().any()]
        facts |= {f"{name}, at the end": f"{last[name].iloc[-1]:.3f}" for name in columns}
        newest = table[table["run"] == last["run"].iloc[-1]].set_index("round")[columns]
    except (ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{folder / at_home.FILE} is damaged ({type(error).__name__}: {error})") from None
    said = (
        "Nats per answer token on this hospital's own held-out cards; lower is better. Received is the average as it "
        "came, trained is after this hospital's own training on it, and alone is an adapter that never met another. "
        "This page stays in this house."
    )
    figure = plotting.lines({name: newest[name] for name in columns}, "NLL (nats per token)", "The newest run")
    parts = [_part("Is it worth it for us?", figure, said)]
    parts.append(("Every round", "", "", "", _html(table.round(3).set_index("run"), "run")))
    return _page("A federation, seen from this hospital", facts, parts)


def _curves(run: kept.Kept) -> Figure:
    lines: dict[str, pd.Series] = {}
    scored = run.history.dropna(subset=["nll"]).set_index("round")["nll"]
    if len(scored):
        lines["the average, on the server's cards"] = scored
    for name, said in (("loss_before", "before"), ("loss_after", "after")):
        if (series := run.rounds.set_index("round")[name].dropna()).size:
            lines[f"the hospitals' own cards, {said} their training"] = series
    return plotting.lines(lines, "nats per token", "What every round changed")


def _part(heading: str, figure: Figure, text: str) -> Part:
    alt, held = plotting.describe(figure), io.BytesIO()
    figure.savefig(held, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return heading, text, base64.b64encode(held.getvalue()).decode(), alt, None


def _attendance(clients: pd.DataFrame) -> Any:
    """Hospitals by rounds, each with what became of its reply."""
    table = clients.pivot_table(index="client", columns="round", values="status", aggfunc="first").fillna("not asked")
    looks = {"used": ' class="used"', "not asked": ""}
    other = ' class="missed"'
    head = "".join(f'<th scope="col">{number}</th>' for number in table.columns)
    rows = [f"<tr><th>hospital</th>{head}</tr>"]
    escape = Environment(autoescape=True).from_string("{{ text }}")
    for client, row in table.iterrows():
        cells = [f"<td{looks.get(status, other)}>{escape.render(text=status)}</td>" for status in row]
        rows.append(f"<tr><td>{client}</td>{''.join(cells)}</tr>")
    return _safe(f"<table>{''.join(rows)}</table>")


def _html(table: pd.DataFrame, name: str) -> Any:
    return _safe(table.rename_axis(name).reset_index().to_html(index=False, border=0, na_rep="–"))


def _safe(text: str) -> Any:
    return Markup(text)  # of numbers and of texts that were escaped


def _page(
    title: str, facts: Mapping[str, Any], parts: list[Part], settings: Mapping | None = None, versions: str = ""
) -> str:
    said = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True) if settings else ""
    given = {"title": title, "facts": facts, "parts": parts, "settings": said, "versions": versions}
    return Environment(autoescape=True).from_string(PAGE).render(**given)
