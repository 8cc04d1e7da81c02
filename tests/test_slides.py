"""Slides of the lecturer's kit: built from stored notebooks, with notes, and whole without a network."""

import re

import pytest
import yaml
from bs4 import BeautifulSoup
from kit import KIT, NOTEBOOKS, ROOT, part, spoken

DECKS = sorted((KIT / "slides").glob("*.yaml"))
FETCHED = ("src", "srcset", "href", "data", "poster", "action")


@pytest.fixture(scope="module")
def decks():
    pytest.importorskip("sphinx_revealjs", reason="the extra `site` is not installed")
    return part("decks")


def test_every_notebook_has_a_deck():
    assert [yaml.safe_load(path.read_text())["notebook"] for path in DECKS] == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", DECKS, ids=lambda path: path.stem)
def test_a_deck_has_about_fifteen_slides_with_notes_and_loads_nothing(decks, path):
    soup = BeautifulSoup(decks.deck(path), "html.parser")
    slides = soup.select(".slides > section")
    assert 13 <= len(slides) <= 17
    for slide in slides:
        notes, title = slide.select_one("aside.notes"), slide.find("h2").text
        assert 25 <= spoken(notes.text) <= 110, f"{title}: {spoken(notes.text)} words of notes"
        notes.extract()
        words = " ".join(one.text for one in slide.select(".words"))
        assert spoken(words) <= (110 if slide.select(".recap, .abilities") else 50), f"{title}: too many words"
        assert all(len(picture["alt"]) > 40 for picture in slide.find_all("img"))
    assert sum(bool(slide.find(["img", "pre"])) for slide in slides) >= 7, "figures and outputs, not only text"
    given = [tag.get(name) for tag in soup.find_all(True) if tag.name != "a" for name in FETCHED]
    assert not [one for one in given if one and not one.startswith("data:")]
    styles = "".join(style.text for style in soup.find_all("style"))
    assert not re.findall(r"@import|url\(\s*['\"]?(?!data:)", styles) and not soup.find_all(["link"], rel="stylesheet")
    assert "Reveal.initialize" in soup.find_all("script")[-1].text


@pytest.mark.parametrize("path", DECKS, ids=lambda path: path.stem)
def test_no_slide_types_a_number_that_a_run_changes(path):
    """Decimals and shares on slides and in notes come from the stored output alone."""
    for slide in yaml.safe_load(path.read_text())["slides"]:
        said = " ".join([slide.get("title", ""), slide.get("text", ""), *slide.get("bullets", []), slide["notes"]])
        sections = r"\b(?:in|section|read|with) \d\.\d+"
        assert not re.findall(r"\d+\.\d+|\d+ ?%", re.sub(sections, "", said)), slide.get("title")


def test_a_slide_and_a_notebook_that_do_not_agree_are_one_line(decks):
    book = decks.read(ROOT / "notebooks" / "02_centralized.ipynb")
    said = {"title": "T", "notes": "said"}
    for wrong, line in (
        ({"figure": "nothing"}, "has no cell nothing"),
        ({"figure": "e159180d"}, "has no picture"),
        ({"section": "2.99"}, "has no section 2.99"),
        ({"output": {"cell": "e159180d", "keep": "nowhere"}}, "nothing like 'nowhere'"),
        ({"code": {"cell": "be9a3e72", "start": "def other"}}, "no line that begins with 'def other'"),
        ({"text": "{gain} nats"}, "no value is given for {gain}"),
        ({"values": {"gain": {"cell": "e159180d", "find": "nothing (.)"}}}, "nothing like"),
        ({"notes": ""}, "has no notes"),
        ({"figures": "b9573052"}, "unknown 'figures'"),
    ):
        with pytest.raises(ValueError, match=re.escape(line)):
            decks.section(book, said | wrong)


def test_a_number_on_a_slide_is_the_stored_one(decks):
    book = decks.read(ROOT / "notebooks" / "02_centralized.ipynb")
    slide = {"title": "{gain} nats", "notes": "It is {gain}."}
    slide["values"] = {"gain": {"cell": "e159180d", "find": r"untuned minus pooled: +(\S+)"}}
    stored = re.search(r"untuned minus pooled: +(\S+)", book.cells["e159180d"].outputs[0].text)[1]
    assert decks.section(book, slide).count(stored) == 2


def test_an_output_too_large_to_read_is_refused(decks):
    book = decks.read(ROOT / "notebooks" / "02_centralized.ipynb")
    with pytest.raises(ValueError, match="too many for a slide"):
        decks.block(book, "x", ["a" * 200], "output")
    sizes = [int(re.search(r"size: (\d+)px", decks.block(book, "x", ["a" * n], "output"))[1]) for n in (10, 60, 110)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= decks.SMALLEST


def test_decks_are_written_by_name_and_a_wrong_one_is_a_line(decks, tmp_path, capsys, monkeypatch):
    assert decks.main(["02"], tmp_path) == 0 and [path.name for path in tmp_path.iterdir()] == ["02.html"]
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "02.yaml").write_text("notebook: 02_centralized\nslides: [{title: T, notes: n, figure: x}]")
    monkeypatch.setattr(decks, "HERE", tmp_path)
    assert decks.main([], tmp_path) == 1 and "02.yaml: 02_centralized has no cell x" in capsys.readouterr().err
