"""What the Hub of `hub_server` keeps: files and commits of repositories, and the faults that are to be made."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class File:
    """A file of a commit; `oid` is the sha256 of LFS files and the git hash of others."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Commits, by their ids, and the branches and tags that name them."""

    private: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, File]) -> str:
        parent = self.refs.get(branch, "")
        digest = hashlib.sha1(f"{parent}{len(self.commits)}{sorted((p, f.oid) for p, f in files.items())}".encode())
        self.refs[branch] = digest.hexdigest()
        self.commits[self.refs[branch]] = files
        return self.refs[branch]

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path matches `path`.

    Kinds: a status such as "503"; "cut" (the connection ends in the middle of the answer, or before an upload's
    answer); "short" (a whole answer, of half the file); "flipped" (one byte is another one).
    """

    method: str
    path: str
    kind: str
    times: int
