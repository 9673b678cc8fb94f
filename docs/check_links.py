"""A check of relative links: those of built pages, with images and anchors, and of the README.

`python docs/check_links.py docs/_build/html` fails if one of them leads nowhere.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


class Page(HTMLParser):
    """The links and anchors of an HTML file."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors = [], {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]


def find_broken(folder):
    """Yield each page with a relative link that leads nowhere."""
    paths = [path.resolve() for path in sorted(folder.rglob("*.html"))]
    pages = {path: Page(path) for path in paths if "_static" not in path.parts}
    if not pages:
        yield folder, "no pages"
    for path, page in pages.items():
        for link in page.links:
            address, anchor = urldefrag(link)
            if re.match(r"[a-z][a-z0-9+.-]*:|//", link):
                continue
            name = unquote(address.partition("?")[0])
            target = (path.parent / name).resolve() if name else path
            known = pages[target].anchors if target in pages else {anchor}
            if not target.exists() or unquote(anchor) not in known:
                yield path, link
    for path in READMES:
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:|#", link) and not (ROOT / urldefrag(link)[0]).exists():
                yield path, link


if __name__ == "__main__":
    broken = [f"{path}: {link}" for path, link in find_broken(Path(sys.argv[1]))]
    sys.exit("\n".join(["Links that lead nowhere:", *broken]) if broken else 0)
