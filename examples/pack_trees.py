"""Pack the trees that `mavis collect` has written so far into few files, to be committed as they grow.

    python examples/pack_trees.py examples/data/trees/temperature-1 [--rest]

A collection that is still running may go on: it only adds files. `--rest` packs the last few, too, when it is done.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mavis_training.trees.tree_store import TreeStore

SIZE = 512


def main() -> None:
    """Pack a store in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, help="folder of the tree store")
    parser.add_argument("--rest", action="store_true", help="pack what does not fill a file, too")
    options = parser.parse_args()
    store = TreeStore.open(options.store)
    store.pack(SIZE, options.rest)
    files = [shard.path for shard in store.shards()]
    total = sum(path.stat().st_size for path in files)
    print(f"{options.store}: {len(store)} trees in {len(files)} files, {total / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
