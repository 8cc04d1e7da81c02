"""Every notebook in JupyterLab, in a real browser: `make test-browser`, half an hour; screenshots in build/browser."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOTS = ROOT / "build" / "browser"
# all cells stay in the page, or those out of sight could not be looked at; and nothing is asked of anyone
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
RED = ".jp-OutputArea-output[data-mime-type$='stderr'], .jp-OutputArea-output[data-mime-type$='error']"
STATE = """() => {
    const panel = window.jupyterapp?.shell?.currentWidget;
    if (!panel?.content?.model?.cells || !panel.sessionContext?.session?.kernel) return null;
    const code = [...panel.content.model.cells].filter(cell => cell.type === "code" && cell.sharedModel.source.trim());
    const bars = [...document.querySelectorAll(".jp-OutputArea-output")].map(o => o.innerText);
    return {
        status: panel.sessionContext.session.kernel.status,
        counts: code.map(cell => cell.executionCount),
        bars: bars.flatMap(text => text.match(/ \\d+%\\|/g) ?? []).map(bar => parseInt(bar)),
    };
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab over a copy of the notebooks, on loopback; ends with the tests."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns("adapters"))
    for name, values in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    options = {
        "ServerApp.root_dir": folder / "notebooks",
        "ServerApp.port": 0,
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.allow_root": True,
        "ServerApp.shutdown_no_activity_timeout": 600,  # and by themselves, where the tests were killed
        "MappingKernelManager.cull_idle_timeout": 600,
        "MappingKernelManager.cull_connected": True,
        "LabApp.expose_app_in_browser": True,
        "LabApp.user_settings_dir": folder / "settings",
        "LabApp.workspaces_dir": folder / "workspaces",
    }
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", *(f"--{k}={v}" for k, v in options.items())]
    log = folder / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=folder)
    try:
        yield address(log, process)
    finally:
        process.terminate()
        process.wait(30)


def address(log, process):
    """Base URL and token, from what the server says of itself."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"(http://127\.0\.0\.1:\d+)/lab\?token=(\w+)", log.read_text()):
            return found[1], found[2]
        time.sleep(0.2)
    raise AssertionError(log.read_text())


@pytest.fixture
def run_all(browser, lab):
    """Open a notebook, run all of its cells as the menu does, and look on until the last."""
    pages = []

    def run(path, minutes=15):
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        pages.append(page)
        page.goto(f"{lab[0]}/lab/tree/{path.name}?token={lab[1]}&reset")
        wait_for(lambda: (page.evaluate(STATE) or {}).get("status") == "idle", 120)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:restart-run-all') }")
        page.locator(".jp-Dialog-button.jp-mod-warn, .jp-Dialog-button.jp-mod-accept").first.click(timeout=10_000)
        cells, seen, until = code_cells(path), set(), time.monotonic() + 60 * minutes
        wait_for(lambda: None in page.evaluate(STATE)["counts"], 60)  # what was stored is gone
        while time.monotonic() < until:
            state = page.evaluate(STATE)
            seen |= set(state["bars"])
            done = state["counts"] == list(range(1, len(cells) + 1))
            if page.locator(RED).count() or (state["status"] == "idle" and done):
                break
            page.wait_for_timeout(500)
        return page, page.evaluate(STATE), seen

    yield run
    for page in pages:
        page.evaluate("() => window.jupyterapp?.shell?.currentWidget?.sessionContext?.shutdown()")
        page.close()


def wait_for(happened, seconds):
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "JupyterLab did not come so far"
        time.sleep(0.3)


def code_cells(path):
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and cell.source.strip()]


def photograph(page, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{name}.png")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_jupyterlab_with_live_bars_and_nothing_red(run_all, path):
    page, state, seen = run_all(path)
    if page.locator(".jp-RenderedImage img").count():
        page.locator(".jp-RenderedImage img").first.scroll_into_view_if_needed()
    photograph(page, path.stem)
    assert [red.inner_text() for red in page.locator(RED).all()] == []
    assert state["counts"] == list(range(1, len(code_cells(path)) + 1))
    assert any(0 < share < 100 for share in seen), "a bar was seen on its way"
    figures = page.locator(".jp-RenderedImage img").all()
    assert figures and all(figure.evaluate("image => image.complete && image.naturalWidth > 100") for figure in figures)
    if any("ipywidgets" in cell.source for cell in code_cells(path)):
        move_a_slider(page, path.stem)


def move_a_slider(page, name):
    """An arrow key on the first slider changes the figure below it."""
    panel = page.locator(".widget-interact").first
    panel.scroll_into_view_if_needed()
    handle, figure = panel.locator(".noUi-handle").first, panel.locator("img").first
    before = figure.get_attribute("src")
    handle.focus()
    handle.press("ArrowRight")
    wait_for(lambda: panel.locator("img").count() and panel.locator("img").first.get_attribute("src") != before, 30)
    photograph(page, f"{name}_slider")
