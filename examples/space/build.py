"""Put together the folder of a Space: `python examples/space/build.py FOLDER`, to be pushed as its repository."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

BUNDLE_FILE = "mavis_bundle.json"
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUNDLE = "model_cards"


def build(folder: Path) -> None:
    """Copy the page, the library and the value heads of the bundle into a new folder.

    Raises:
        FileExistsError: there is such a folder.
    """
    shutil.copytree(
        ROOT / "src" / "mavis_logits", folder / "mavis_logits", ignore=shutil.ignore_patterns("__pycache__")
    )
    bundle = json.loads((ROOT / BUNDLE / BUNDLE_FILE).read_text(encoding="utf-8"))
    for part in sorted({entry["subfolder"] for entry in bundle["value_functions"].values()}):
        shutil.copytree(ROOT / BUNDLE / part, folder / BUNDLE / part)
    shutil.copy2(ROOT / BUNDLE / BUNDLE_FILE, folder / BUNDLE)
    for path in (HERE / "README.md", HERE / "app.py", HERE / "requirements.txt", ROOT / "LICENSE"):
        shutil.copy2(path, folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/space/build.py FOLDER (which must not exist)")
    try:
        build(Path(sys.argv[1]))
    except FileExistsError as error:
        sys.exit(f"{error}: give the name of a new folder")
