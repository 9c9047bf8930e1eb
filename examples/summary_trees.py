"""Take from the shipped data set the trees whose prompts ask for a summary, for rewards of their own.

python examples/summary_trees.py --out runs/summaries/trees --trees 640 --answers 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mavis_training.trees.tree_store import TreeStore
from summary_data import INSTRUCTION

SIZE = 64


def main() -> None:
    """Write a store of these trees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("examples/data/trees/temperature-1"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the store to write")
    parser.add_argument("--trees", type=int, help="at most so many")
    parser.add_argument("--answers", type=int, help="of each, at most so many")
    args = parser.parse_args()
    store = TreeStore.open(args.store).sampled(None, args.answers)
    trees = [tree for tree in store if tree.prompt.startswith(INSTRUCTION)][: args.trees]
    own = TreeStore.create(args.out, store.metadata)
    for number, start in enumerate(range(0, len(trees), SIZE)):
        own.write(trees[start : start + SIZE], number)
    print(f"{args.out}: {len(trees)} trees")


if __name__ == "__main__":
    main()
