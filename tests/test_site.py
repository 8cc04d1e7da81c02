"""The course as static pages: built from what is stored, with no network, and whole."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

pytest.importorskip("sphinx", reason="the extra `site` is not installed")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site():
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "notebooks").glob("*.ipynb")}
    command = [sys.executable, str(ROOT / "docs" / "site.py")]
    done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}, "the notebooks themselves are left alone"
    return ROOT / "build" / "site"


def test_every_page_has_its_figures_solutions_and_way_on(site):
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for number, path in enumerate(paths):
        page = (site / f"{path.stem}.html").read_text(encoding="utf-8")
        cells = nbformat.read(path, as_version=4).cells
        figures = sum("image/png" in out.get("data", {}) for cell in cells for out in cell.get("outputs", []))
        shown = re.findall(r'src="(_images/[^"]+\.png)"', page)
        assert len(shown) == figures and all((site / name).stat().st_size > 1000 for name in shown), path.name
        solutions = sum(cell.source.count("<details><summary>") for cell in cells)
        assert solutions >= 2 and page.count("<details><summary>") == solutions, "folded, and all"
        loaded = re.findall(r'<(?:script|link)[^>]+(?:src|href)="([^"]+)"', page)
        assert loaded and not [address for address in loaded if "//" in address], "nothing comes from elsewhere"
        if number + 1 < len(paths):
            assert f'href="{paths[number + 1].stem}.html"' in page
        assert 'name="viewport"' in page, "a phone shows it at its own width"


def test_one_can_search_and_finds_what_stands_around_the_notebooks(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(word in index for word in ("membership", "supernod", "flora"))
    front = (site / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}.html"' in front for page in ("course", "teaching/README", "glossary", "01_intro"))
