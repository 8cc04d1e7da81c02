"""A run notebook as one page that needs nothing from elsewhere: formulas, pictures and their texts are in it."""

import copy
import re

import nbformat
from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from nbconvert import HTMLExporter

DOLLAR = "\ue000"  # stands for a dollar that opens no formula, while formulas are looked for
FOREIGN = re.compile(r"@import|url\(\s*(?!['\"]?(?:data:|#))")  # in a style: what a browser would fetch
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<line>[^$\n]+?)\$(?!\d)", re.DOTALL)


def page(notebook: nbformat.NotebookNode) -> str:
    """The notebook as HTML, without scripts and without anything that a browser would fetch before it is asked to."""
    notebook = copy.deepcopy(notebook)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "markdown"):
        cell.source = re.sub(r"(?<!\\)\\\$", DOLLAR, cell.source)
    soup = BeautifulSoup(HTMLExporter().from_notebook_node(notebook)[0], "html.parser")
    for other in soup.find_all(["script", "iframe", "link", "object", "embed"]):
        other.decompose()
    for style in soup.select(".jp-OutputArea style"):
        if FOREIGN.search(style.text):
            style.decompose()
    for other in soup.find_all(src=True):
        if not other["src"].startswith("data:"):
            other.replace_with(other.get("alt", ""))  # a badge
    pictures = soup.select('.jp-RenderedImage img[src^="data:image/png"]')
    for picture, text in zip(pictures, alternatives(notebook), strict=False):
        picture["alt"] = text
    for text in soup.select(".jp-RenderedMarkdown"):
        for node in text.find_all(string=FORMULA):
            if not node.find_parent(["code", "pre"]):
                node.replace_with(
                    BeautifulSoup(FORMULA.sub(_mathml, node.output_ready(formatter="minimal")), "html.parser")
                )
    for node in soup.find_all(string=re.compile(DOLLAR)):
        node.replace_with(node.replace(DOLLAR, r"\$" if node.find_parent(["code", "pre"]) else "$"))
    return str(soup)


def alternatives(notebook: nbformat.NotebookNode) -> list[str]:
    """The alternative text of each picture that cells have put out, in order; empty where there is none."""
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [out for out in outputs if "image/png" in out.get("data", {}) and "text/html" not in out["data"]]
    return [out["metadata"].get("image/png", {}).get("alt", "") for out in pictures]


def _mathml(found: re.Match) -> str:
    formula = BeautifulSoup(found["block"] or found["line"], "html.parser").get_text()  # & and < were escaped
    return convert(formula, display="block" if found["block"] else "inline")
