"""Values from pairs: preference data (prompt, chosen, rejected) as a store of trees of two answers each.

No rollouts and no reward model: the answer that was chosen has reward 1, the other 0, and the rule "pairs" of
`fitting.paths` (Bradley-Terry over the sums of advantages along both) learns from them what steers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mavis_logits.backbone.fingerprint import Identity, tokenizer_fingerprint
from mavis_logits.core.chat import ChatTemplate, encode_prompt

from .base.files import numbered_json_lines
from .base.formats import Columns, Dropped, Limits, column_prompt, content_text
from .base.kept import digest
from .base.prompts import prompt_id
from .sampling.reference import eos_token_ids
from .trees.data import PAIRS
from .trees.tree import Tree
from .trees.tree_store import StoreMetadata, TreeStore

_SHARD = 256  # pairs of a file


@dataclass(frozen=True)
class Pair:
    """One row.

    Attributes:
        prompt: the user's last words.
        conversation: the turns up to them, if there are several.
        chosen, rejected: two answers.
    """

    prompt: str
    conversation: list[dict[str, str]] | None
    chosen: str
    rejected: str


def read_pairs(source: str) -> tuple[list[Pair], Counter[str]]:
    """Rows of a JSON-lines file with `prompt`, `chosen` and `rejected`: texts, or messages as TRL has them.

    Without a `prompt`, the messages of `chosen` before its last are it.

    Returns:
        The pairs, and a count of why others were left out.

    Raises:
        OSError: there is no such file.
        ValueError: a line is no JSON object, or lacks a column; or no pair is left. The message names the line.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for number, row in numbered_json_lines(source):
        try:
            pairs.append(_pair(row))
        except Dropped as reason:
            dropped[str(reason)] += 1
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: {error}") from error
    if not pairs:
        raise ValueError(f"{source} has no pairs" + (f": {_told(dropped)}" if dropped else ""))
    return pairs, dropped


def _told(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} left out ({why})" for why, count in dropped.items())


def _pair(row: Mapping[str, Any]) -> Pair:
    missing = [name for name in ("chosen", "rejected") if name not in row]
    if missing:
        raise ValueError(f"a row has no {missing[0]!r}, only {', '.join(sorted(row))}: rename the columns")
    chosen, rejected = (_last(row[name], name) for name in ("chosen", "rejected"))
    given = row.get("prompt")
    if given is None:
        if not isinstance(row["chosen"], list):
            raise ValueError("a row has no 'prompt', and 'chosen' is no list of messages that it could be taken from")
        given = row["chosen"][:-1]
    example = column_prompt({"prompt": given}, Columns(), Limits())
    if chosen.strip() == rejected.strip():
        raise Dropped("both answers are the same")
    return Pair(example.prompt, example.conversation, chosen.strip(), rejected.strip())


def _last(value: Any, name: str) -> str:
    """An answer, or the last message of a conversation."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping) and "content" in value[-1]:
        value = content_text(value[-1])
    if not isinstance(value, str):
        raise ValueError(f"column {name!r} holds {type(value).__name__}, expected text or messages")
    if not value.strip():
        raise Dropped(f"empty {name}")
    return value


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """Of what pairs say."""
    return digest([[p.prompt, p.conversation, p.chosen, p.rejected] for p in pairs])


def pairs_store(
    pairs: Sequence[Pair],
    folder: str | Path,
    objective: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    chat_template: ChatTemplate = "auto",
) -> TreeStore:
    """A labelled store of one tree a pair; what is there already is not written again.

    Args:
        pairs: rows.
        folder: of the store.
        objective: name of the reward, 1 for the chosen and 0 for the rejected answer.
        model: the language model that is to be steered.
        tokenizer: its tokenizer.
        max_new_tokens: of an answer; what comes behind them is cut off.
        chat_template: how prompts are put, as for `mavis collect`.

    Raises:
        ValueError: the store is of other pairs or of another model.
    """
    identity = Identity(model)
    content = pairs_digest(pairs)
    metadata = StoreMetadata(
        model=model.config.name_or_path or type(model).__name__,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        sampling={PAIRS: content, "max_new_tokens": max_new_tokens, "chat_template": chat_template},
        weights_fingerprint=identity.fingerprint,
        weights_sketch=identity.sketch,
    )
    TreeStore.create(folder, metadata)
    store = TreeStore.open(folder)
    ends = eos_token_ids(model.generation_config, tokenizer)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends, default=None)
    trees = [_tree(pair, tokenizer, end, max_new_tokens, chat_template) for pair in pairs]
    trees = [tree for tree in _numbered(trees) if tree.prompt_id not in store.prompt_ids()]
    for start in range(0, len(trees), _SHARD):
        store.write(trees[start : start + _SHARD], next(iter(store.free_numbers())))
    for shard in store.shards():
        if not shard.has_rewards(objective):
            shard.write_rewards(objective, [np.array([1.0, 0.0])] * len(shard.trees()), f"pairs:{content}")
    return store


def _tree(
    pair: Pair, tokenizer: PreTrainedTokenizerBase, end: int | None, most: int, chat_template: ChatTemplate
) -> Tree:
    prompt = encode_prompt(pair.conversation or pair.prompt, tokenizer, chat_template)
    answers = []
    for text in (pair.chosen, pair.rejected):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        answers.append((ids if end is None else [*ids, end])[:most])
    lengths = [len(ids) for ids in answers]
    columns = {} if pair.conversation is None else {"conversation": pair.conversation}
    return Tree(
        prompt_id(pair.prompt, pair.conversation),
        pair.prompt,
        prompt_tokens=np.array(prompt),
        tokens=np.array(answers[0] + answers[1]),
        parent=np.array([-1, -1]),
        start=np.array([0, lengths[0]]),
        length=np.array(lengths),
        logp_gen=np.zeros(2),
        logp_ref=np.zeros(2),
        terminal=np.array([True, True]),
        columns=columns,
    )


def _numbered(trees: Sequence[Tree]) -> list[Tree]:
    """The trees, those of one prompt told apart."""
    seen: Counter[str] = Counter()
    for tree in trees:
        seen[tree.prompt_id] += 1
        tree.prompt_id += f"-{seen[tree.prompt_id]}" if seen[tree.prompt_id] > 1 else ""
    return list(trees)
