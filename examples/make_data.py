"""Draw the prompt files of `examples/data` from the full prompt collections.

    python examples/make_data.py --data FOLDER --out examples/data

FOLDER holds `helpful_prompts.jsonl`, `helpful_pairs_{train,test}.jsonl`, `hh_harmless_{train,test}.jsonl`,
`hh_harmful_prompts.jsonl`, `xstest_prompts.jsonl` and `summ_scitldr_{train,test}.jsonl`;
`examples/data/README.md` names where each comes from. The result is the same on every run.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from reward_data import read_records
from summary_data import read_documents, summary_prompt

Row = dict[str, str]
MAX_TOKENS = 80  # of the SmolLM2 tokenizer; the sources carry the count
MAX_CHARACTERS = 300  # where a source carries no count of tokens
SEED = 0
TOGETHER = 16  # prompts of similar length
# Sources of benign questions and tasks, for examples.
EVERYDAY = {
    "self_instruct_seed", "self_instruct_user", "vicuna_bench", "mt_bench", "oasst100", "llmbar", "finegrained_qa",
}  # fmt: skip


def ids(prefix: str, names: str) -> tuple[str, ...]:
    """The ids `prefix-name` of space-separated names."""
    return tuple(f"{prefix}-{name}" for name in names.split())


# Held-out, clearly benign, answerable in a few sentences: chosen by hand.
DEMO_IDS = ids(
    "hp",
    "a610ec3160f3 283e590f842f 05243cbf37bb 0d73389ed498 4c2c8e59b5a8 06e74b624cec e85e5decc6be 9ab4c85fcff2 "
    "5a4b1a291b23 c23c5a014fe7 5f4723197f64 5861ffb9c2e1 45aeaf64af59 384dc121e5aa 24648ae20b5d 32d6bdb81a69 "
    "99e3992978e4 7cd8b6ad910f 3be3b31ddba5 e9e3e434074a 5687ef9c367d 876861a4798d 06a218ad3e89 c8c32d324d9c",
)

# Not self-contained (they refer to an underlined word or a map), or themselves quote abuse.
SKIPPED_IDS = ids("hp", "dd03839c10ef 0f03b031dd47 ab81f4aebd03 02341d7702a8 3d0ffb5f8ac1 d5301de3b44e ccca8df53d6d")

# The shippable test prompts are 11 too few: short self-contained questions of the held-out LLMBar pairs complete them.
EXTRA_TEST_IDS = ids(
    "llmbar",
    "77a079288caf 4cf765961927 721dddf78fab 12207d57dca8 dcb0353e328f 0b01c29260d9 30156d8761fe ef72c7e3854c "
    "937c0e427c30 84d022418cb3 0611ae6743c3 a88f6915bc75 3e026d7bb470 426c9a9fcdfe 4a5f420f6243",
)


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON record a line, UTF-8, keys in order."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def normalise(prompt: str) -> str:
    """The form under which two prompts count as the same one: lower-cased alphanumerics."""
    return re.sub(r"[^a-z0-9]", "", prompt.lower())


def prompt_row(record: dict, kind: str, source: str | None = None, license: str | None = None) -> Row:
    """The record as it is shipped; `source` and `license` fill in what the record itself does not say."""
    return {
        "id": record["id"],
        "prompt": record["prompt"],
        "source": source or record["source"],
        "kind": kind,
        "license": license or record["license"],
    }


def helpful_rows(data: Path, split: str) -> list[Row]:
    """Shippable benign prompts of a split (HaluEval queries have non-commercial upstream terms)."""
    records = read_records(data / "helpful_prompts.jsonl")
    return [
        prompt_row(record, "helpful")
        for record in records
        if record["split"] == split
        and record["source"] != "halueval_general"
        and record["prompt_tokens"] <= MAX_TOKENS
        and record["id"] not in SKIPPED_IDS
    ]


def extra_helpful_rows(data: Path) -> list[Row]:
    """The hand-picked held-out LLMBar prompts."""
    records = {record["id"]: record for record in read_records(data / "helpful_pairs_test.jsonl")}
    return [prompt_row(records[name], "helpful") for name in EXTRA_TEST_IDS]


def paired_helpful_rows(data: Path) -> list[Row]:
    """Short prompts of the training preference pairs."""
    records = read_records(data / "helpful_pairs_train.jsonl")
    return [prompt_row(record, "helpful") for record in records if len(record["prompt"]) <= MAX_CHARACTERS]


def harmful_rows(data: Path, split: str) -> list[Row]:
    """First human turns of HH red-team dialogues of a split, from both collections."""
    dialogues = read_records(data / f"hh_harmless_{split}.jsonl")
    prompts = [r for r in read_records(data / "hh_harmful_prompts.jsonl") if r["split"] == split]
    rows = [prompt_row(r, "harmful", "hh_harmless_base", "MIT") for r in dialogues if r["prompt_tokens"] <= MAX_TOKENS]
    rows += [
        prompt_row(r, "harmful", "stable_alignment", "Apache-2.0 (over MIT)")
        for r in prompts
        if r["prompt_tokens"] <= MAX_TOKENS and not (split == "train" and r["in_hh_harmless_test"])
    ]
    return rows


def summary_rows(data: Path) -> list[Row]:
    """Abstracts to be summarised, each put as one request."""
    return [
        {
            "id": r["id"],
            "prompt": summary_prompt(r["text"]),
            "source": "scitldr",
            "kind": "helpful",
            "license": "Apache-2.0",
        }
        for r in read_documents(data, "train", ["scitldr"])
    ]


def summaries(data: Path) -> dict[str, list[Row]]:
    """Held-out abstracts with a person's summary as `completion`: 100, and 40 more to choose settings by."""
    rows = [
        {
            "id": record["id"],
            "prompt": summary_prompt(record["text"]),
            "completion": record["references"][0],
            "source": record["source"],
            "license": "Apache-2.0",
        }
        for record in read_documents(data, "test", ["scitldr"])
    ]
    chosen = random.Random(SEED).sample(rows, 140)
    return {"summaries_test.jsonl": chosen[:100], "summaries_validation.jsonl": chosen[100:]}


def xstest_rows(data: Path) -> list[Row]:
    """Safe requests that look unsafe, and unsafe ones that look like them."""
    kinds = {"safe": "helpful", "unsafe": "harmful"}
    return [
        prompt_row(r, kinds[r["label"]], "xstest", "CC BY 4.0") for r in read_records(data / "xstest_prompts.jsonl")
    ]


def tree_rows(data: Path, train: list[Row], held_out: set[str], rng: random.Random) -> list[Row]:
    """All prompts that trees are sampled for; none that is held out.

    Those of one length stand together, by sixteens, so that what is sampled side by side needs little padding; the
    sixteens are shuffled, so that any part is like the whole.

    Args:
        data: folder of the full collections.
        train: the training prompts of the smaller files, which are among them.
        held_out: prompts that are not, normalised.
        rng: shuffles.
    """
    benign = [*helpful_rows(data, "train"), *paired_helpful_rows(data), *summary_rows(data)]
    rows = list(unique([*train, *benign, *xstest_rows(data), *harmful_rows(data, "train")], set(held_out)))
    rows.sort(key=lambda row: (len(row["prompt"]), row["id"]))
    together = [rows[start : start + TOGETHER] for start in range(0, len(rows), TOGETHER)]
    return [row for part in rng.sample(together, len(together)) for row in part]


def unique(rows: Iterable[Row], taken: set[str]) -> Iterator[Row]:
    """Rows whose normalised prompt is not in `taken`; adds each to `taken`."""
    for row in rows:
        key = normalise(row["prompt"])
        if key and key not in taken:
            taken.add(key)
            yield row


def balanced(helpful: list[Row], harmful: list[Row], count: int, rng: random.Random) -> list[Row]:
    """`count` rows in pairs of one helpful and one harmful prompt, so that every prefix is balanced.

    Raises:
        ValueError: when either list is too short.
    """
    half = count // 2
    for kind, rows in (("helpful", helpful), ("harmful", harmful)):
        if len(rows) < half:
            raise ValueError(f"only {len(rows)} {kind} prompts found, {half} are needed: is the data folder complete?")
    chosen: list[Row] = []
    for pair in zip(rng.sample(helpful, half), rng.sample(harmful, half), strict=True):
        chosen += rng.sample(pair, 2)
    return chosen


def make_prompts(data: Path) -> dict[str, list[Row]]:
    """The prompt files, by file name; no prompt is in two of them."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    held_out = {row["id"]: row for row in helpful_rows(data, "test")}
    demo = list(unique((held_out[name] for name in DEMO_IDS), taken))
    test_helpful = list(unique([*held_out.values(), *extra_helpful_rows(data)], taken))
    test_harmful = list(unique(harmful_rows(data, "test"), taken))
    train_helpful = list(unique(helpful_rows(data, "train"), taken))
    train_harmful = list(unique(harmful_rows(data, "train"), taken))
    test = balanced(test_helpful, test_harmful, 140, rng)
    train = balanced(train_helpful, train_harmful, 700, rng)
    used = {row["id"] for row in train}
    rest_helpful = [row for row in train_helpful if row["id"] not in used]
    rest_helpful += unique(paired_helpful_rows(data), taken)
    rest_harmful = [row for row in train_harmful if row["id"] not in used]
    more = balanced(rest_helpful, rest_harmful, 600, rng)
    held_out = {normalise(row["prompt"]) for row in (*demo, *test_helpful, *test_harmful)}
    trees = tree_rows(data, [*train, *more], held_out, rng)
    return {
        "demo_prompts.jsonl": demo,
        "prompts_test.jsonl": test,
        "prompts_train.jsonl": train,
        "prompts_more.jsonl": more,
        "prompts_trees.jsonl": trees,
        "prompts_everyday.jsonl": [row for row in trees if row["source"] in EVERYDAY and row["kind"] == "helpful"],
    }


def main() -> None:
    """Write the prompt files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the full collections")
    parser.add_argument("--out", type=Path, default=Path("examples/data"), help="folder to write to")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in (make_prompts(args.data) | summaries(args.data)).items():
        write_jsonl(args.out / name, rows)
        print(f"{name}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
