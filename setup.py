"""Makes the page that a package index shows of README.md.

Everything else is in pyproject.toml. Links to files of the repository lead
nowhere on an index. With a `Source` in `[project.urls]` they lead there;
without one, only their text stays.
"""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

LINK = re.compile(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)")


def page(readme: str, project: str) -> str:
    """The text of `readme` with links that work everywhere."""
    source = re.search(r'^Source = "([^"]+)"$', project, re.MULTILINE)
    if source:
        return LINK.sub(rf"[\1]({source[1].rstrip('/')}/blob/main/\2)", readme)
    return LINK.sub(r"\1", readme)


if __name__ == "__main__":
    setup(
        long_description=page(
            (ROOT / "README.md").read_text(encoding="utf-8"),
            (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
        ),
        long_description_content_type="text/markdown",
    )
