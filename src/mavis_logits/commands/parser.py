"""Command lines whose unknown options are told with the one that may have been meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..core.known import meant


class Parser(argparse.ArgumentParser):
    """As argparse's otherwise."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """What the options say; with an unknown one the process ends with exit status 2, as with any wrong one."""
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            unknown = next((word for word in rest if word.startswith("-")), None)
            if unknown is None:
                self.error(f"nothing is known of {' '.join(rest)}: a text with spaces goes into quotes")
            self.error(f"unknown option {unknown}: {meant(unknown.partition('=')[0], options)}")
        return found
