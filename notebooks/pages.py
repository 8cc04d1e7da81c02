"""A run notebook as one page that needs nothing from elsewhere: formulas, pictures and their texts are in it."""

import re

import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<line>[^$\n]+?)\$(?!\d)", re.DOTALL)


def page(notebook: nbformat.NotebookNode) -> str:
    """The notebook as HTML, without scripts and without anything that a browser would fetch before it is asked to."""
    html = HTMLExporter().from_notebook_node(notebook)[0]
    soup = BeautifulSoup(html, "html.parser")
    for script in soup.find_all("script"):
        script.decompose()
    texts = iter(alternatives(notebook))
    for picture in soup.find_all("img"):
        if picture["src"].startswith("data:image/png") and not picture.find_parent(class_="jp-RenderedMarkdown"):
            picture["alt"] = next(texts)
        elif picture["src"].startswith("http"):
            picture.replace_with(picture.get("alt", ""))  # a badge
    for text in soup.select(".jp-RenderedMarkdown"):
        for node in text.find_all(string=FORMULA):
            if not node.find_parent(["code", "pre"]):
                node.replace_with(
                    BeautifulSoup(FORMULA.sub(_mathml, node.output_ready(formatter="minimal")), "html.parser")
                )
    return str(soup)


def alternatives(notebook: nbformat.NotebookNode) -> list[str]:
    """The alternative text of each picture that cells have put out, in order; empty where there is none."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    return [out["metadata"].get("image/png", {}).get("alt", "") for out in pictures]


def _mathml(found: re.Match) -> str:
    formula = BeautifulSoup(found["block"] or found["line"], "html.parser").get_text()  # & and < were escaped
    return convert(formula, display="block" if found["block"] else "inline")
