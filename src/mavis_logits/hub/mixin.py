"""`push_to_hub` of value functions: with an honest card, and through the checks of `mavis push`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

_PUSH_ARGUMENTS = (
    "repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description", "tags",
)  # fmt: skip


class PushMixin:
    """Stands before `PreTrainedModel` among the bases of a value function."""

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Publish this value function, with a card; arguments and errors as for `publish.push_function`.

        Its `metrics=` and `details=` are what the card can say beyond the config. A folder that training wrote has them
        in its files: `mavis push FOLDER REPO` publishes that.
        """
        from .publish import push_function

        return push_function(self, repo_id, **kwargs)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as transformers does, safetensors only, and publish it if `push_to_hub`."""
        push = {key: kwargs.pop(key) for key in _PUSH_ARGUMENTS if key in kwargs}
        self._save(Path(save_directory), **kwargs)
        if push_to_hub:
            self.push_to_hub(push.pop("repo_id", None) or Path(save_directory).name, **push)

    def _save(self, folder: Path, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)  # type: ignore[misc]
