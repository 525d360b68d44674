"""The description on a package index: the README, whose links to files lead to the repository there.

Everything else is in pyproject.toml. In a clone and on a code host the README's relative links work as they are.
"""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = "https://github.com/hf-segvit/hf_segvit"


def description() -> str:
    """The README with absolute links; images need the address of the file itself."""
    readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8")

    def absolute(link: re.Match) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({REPOSITORY}/{kind}/main/{link[3]})"

    return re.sub(r"(!?)\[([^]\n]*)\]\((?!https?:|#)([^)\n]+)\)", absolute, readme)


if __name__ == "__main__":
    setup(long_description=description(), long_description_content_type="text/markdown")
