"""Where the files are that a clone of the repository has and an installed wheel has not."""

from __future__ import annotations

from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[3]


def checkout_path(relative: str) -> Path:
    """Return a file or folder of the repository, such as ``model_cards/...``, from any working directory.

    Raises:
        FileNotFoundError: There is no such path, neither here nor in the clone that this package was installed from.
    """
    for root in (Path.cwd(), _REPOSITORY):
        if (root / relative).exists():
            return root / relative
    raise FileNotFoundError(
        f"{relative} is part of the mavis-logits repository, not of the installed package. "
        "Run this inside a clone of the repository, or name files of your own."
    )
