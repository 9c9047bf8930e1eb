"""Put together the folder of a Space: `python examples/space/build.py FOLDER`, to be pushed as its repository."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEAD = "model_cards/smollm2-135m-value-head"


def build(folder: Path) -> None:
    """Copy the page, the library and the value head into a new folder.

    Raises:
        FileExistsError: there is such a folder.
    """
    shutil.copytree(
        ROOT / "src" / "mavis_logits", folder / "mavis_logits", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / HEAD, folder / HEAD)
    for path in (HERE / "README.md", HERE / "app.py", HERE / "requirements.txt", ROOT / "LICENSE"):
        shutil.copy2(path, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/space/build.py FOLDER (which must not exist)")
    try:
        build(Path(sys.argv[1]))
    except FileExistsError as error:
        sys.exit(f"{error}: give the name of a new folder")
