"""A hook of the documentation site: links to files outside of docs/ lead to the repository.

Pages link to scripts and tests by relative paths, so that they work in a clone and on a code host. The site holds none
of those files; a link to one that does not exist ends the build.
"""

import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/hf-segvit/hf_segvit/blob/main"
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    """Replace links that leave docs/; MkDocs calls it for each page."""
    source = page.file.src_uri

    def absolute(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), link[1]))
        if path.startswith("docs/"):
            return link[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{source} links to {path}, which does not exist; correct the link")
        return f"]({REPOSITORY}/{path}{link[2] or ''})"

    return LINK.sub(absolute, markdown)
