"""Files that are written whole or not at all, since a run that is resumed reads them."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file beside the one that is there, and puts it in its place."""
    scratch = path.with_suffix(".scratch")
    scratch.write_text(text)
    os.replace(scratch, path)
