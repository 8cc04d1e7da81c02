"""Write owner, repository and release tag from pyproject.toml into every badge, set-up cell, link to docs and citation.

``python notebooks/badges.py [OTHER_ROOT]`` (``make badges``): after a fork, or for a new version. The tag is ``v`` and
the version; the repository is ``project.urls.Repository``.
"""

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = r"[\w.-]+"


def main(root: Path) -> list[Path]:
    """Rewrite the files under a root whose addresses are others; returns them."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.fullmatch(rf"https://github\.com/({NAME}/{NAME})", project["urls"]["Repository"])
    if found is None:
        raise SystemExit(f"project.urls.Repository={project['urls']['Repository']}: not https://github.com/OWNER/NAME")
    where, version = found[1], project["version"]
    rules = (
        (rf"(colab\.research\.google\.com/github/){NAME}/{NAME}/blob/[^/\s]+/", rf"\g<1>{where}/blob/v{version}/"),
        (rf"(git\+https://github\.com/){NAME}/{NAME}@v[\w.]+", rf"\g<1>{where}@v{version}"),
        (
            rf"(git clone https://github\.com/){NAME}/{NAME} && cd {NAME}",
            rf"\g<1>{where} && cd {where.split('/')[1]}",
        ),
        (rf"(repository-code: https://github\.com/){NAME}/{NAME}", rf"\g<1>{where}"),
        (rf"(\]\(https://github\.com/){NAME}/{NAME}/blob/[^/\s]+/docs/", rf"\g<1>{where}/blob/v{version}/docs/"),
        (r"(?m)^(version: )\d[\w.]*$", rf"\g<1>{version}"),
        (r"(Badges open the release tag )v[\w.]+\w", rf"\g<1>v{version}"),
    )
    changed = []
    for path in [root / "README.md", root / "CITATION.cff", *sorted((root / "notebooks").glob("*.ipynb"))]:
        text = new = path.read_text(encoding="utf-8")
        for pattern, written in rules:
            new = re.sub(pattern, written, new)
        if new != text:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for path in main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT):
        print(path)
