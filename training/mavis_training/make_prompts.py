"""`mavis prompts`: prompts of a data set, as section F.1 prepares them, in the file that the other commands read."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from datasets import Dataset, DatasetDict, ReadInstruction, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from mavis_logits.models import load_tokenizer

from .base.files import write_json, write_json_lines
from .base.formats import FORMATS, Columns, Dropped, Example, Limits, Row, Style
from .base.prompts import numbered_rows, prompt_id, prompt_key, read_prompts

_BUILDERS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class PromptsConfig:
    """Which prompts to take from which data set. Bounds left out are section F.1's for the format, if it has any.

    Attributes:
        source: Hub id of a data set, folder that `datasets` can load or has saved, or .jsonl, .json, .csv or .parquet
            file (or .gz), or a .txt file with a prompt a line.
        output: JSON-lines file to write; the counts of what was dropped go beside it, as .counts.json.
        format: "hh" is Anthropic/hh-rlhf (`chosen`), "summarize" openai/summarize_from_feedback, subset comparisons
            (`info`, `summaries`, `choice`), "column" any data set with a column of prompts.
        load: further arguments of `datasets.load_dataset`, such as name, data_dir or revision.
        split: of the data set, or a part as in "train[:100]"; of files and folders that have no splits, "train" is
            everything.
        prompt_column: for "column": holds texts, or conversations as TRL has them.
        completion_column: for "column" with completions: holds texts or messages.
        template: text of the prompt, with {text} where the row's own goes; empty for the format's.
        style: for "hh": "raw" is the text up to and with "Assistant: " (the paper); "turn" the human's words alone, for
            chat models.
        completions: write pairs for `mavis sft`, with the final answer as `completion`; bounds on tokens are then None
            unless given.
        exclude: prompt files whose prompts are left out, such as those to test on.
        keep: further columns of the data set to keep.
        tokenizer: counts tokens, by Hub id or folder, or "smollm2"; needed where there are bounds on tokens.
        min_characters: of the text before the template. 0 for no bound, here and below.
        max_characters: of the text before the template.
        min_tokens: of the prompt.
        max_tokens: of the prompt.
        shuffle: seed of a random order; None keeps the data set's.
        skip: this many of the prompts that pass, from the top.
        limit: at most this many prompts after those; None for all.
    """

    source: str
    output: str
    format: Literal["column", "hh", "summarize"] = "column"
    load: dict[str, Any] = field(default_factory=dict)
    split: str = "train"
    prompt_column: str = "prompt"
    completion_column: str | None = None
    template: str = ""  # not None: the command line would read text that begins with "#" as that
    style: Style = "raw"
    completions: bool = False
    exclude: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    tokenizer: str | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    shuffle: int | None = None
    skip: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.style not in ("raw", "turn"):
            raise ValueError(f"style must be 'raw' or 'turn', got {self.style!r}")
        if self.template and "{text}" not in self.template:
            raise ValueError(f"template must have {{text}} where the row's text goes, got {self.template!r}")
        if self.skip < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"skip must be at least 0 and limit at least 1, got {self.skip} and {self.limit}")
        if self.completions and self.format == "column" and self.completion_column is None:
            raise ValueError("completions of format 'column' need a completion_column")
        limits = self.limits()
        if self.tokenizer is None and (limits.min_tokens is not None or limits.max_tokens is not None):
            raise ValueError(
                f"prompts are to have {limits.min_tokens or 0} to {limits.max_tokens or 'any number of'} tokens: give "
                "the base model's tokenizer to count them, or max_tokens 0 and min_tokens 0 for no such bounds"
            )

    def limits(self) -> Limits:
        """The bounds that hold: those given, else those of the format."""
        limits = FORMATS[self.format].limits
        if self.completions:
            limits = replace(limits, min_tokens=None, max_tokens=None)
        given = {name: getattr(self, name) for name in asdict(limits) if getattr(self, name) is not None}
        return replace(limits, **{name: value or None for name, value in given.items()})


@dataclass(frozen=True)
class PromptCounts:
    """What became of the rows of a data set: those written, those dropped by reason, and the columns left out."""

    rows: int
    written: int
    dropped: dict[str, int]
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        reasons = "".join(f"\n  {count:>8}  dropped: {reason}" for reason, count in self.dropped.items())
        lines = f"  {self.rows:>8}  rows{reasons}\n  {self.written:>8}  written"
        if not self.left_out:
            return lines
        return lines + (
            f"\nColumns left out: {', '.join(self.left_out)}. A reward that needs one gets it only if it is kept now, "
            f"before trees are collected: --keep '{json.dumps(self.left_out)}'"
        )


def make_prompts(config: PromptsConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptCounts:
    """Write the prompts (and completions) of a data set to a JSON-lines file, without duplicates.

    Every line has an `id` (the row's own, or one made from the prompt), the `prompt`, a `conversation` where there are
    several turns, the `completion` if asked for, and the columns to keep.

    Args:
        config: what to take.
        tokenizer: in place of the one that `config.tokenizer` names.

    Raises:
        ValueError: rows without the columns of the format, or no row that passes. Nothing is written then.
        OSError: no such data set.
    """
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    excluded = {_key(line) for file in config.exclude for line in read_prompts(file)}
    rows = load_rows(config.source, config.split, config.load)
    if config.shuffle is not None:
        rows = list(rows)
        random.Random(config.shuffle).shuffle(rows)
    dropped: Counter[str] = Counter()
    read, written = 0, []
    names: set[str] = set()
    for row in rows:
        read += 1
        names |= row.keys()
        try:
            written.append(_passing(row, config, tokenizer))
        except Dropped as reason:
            dropped[str(reason)] += 1
        except ValueError as error:
            raise ValueError(f"{config.source}, row {read} read as format {config.format!r}: {error}") from error
    unique: dict[str, dict[str, Any]] = {}
    for line in written:
        unique.setdefault(_key(line), line)
    lines = [line for key, line in unique.items() if key not in excluded]
    chosen = lines[config.skip :][: config.limit]
    dropped["duplicate"] = len(written) - len(unique)
    dropped["in exclude"] = len(unique) - len(lines)
    dropped["before skip or beyond limit"] = len(lines) - len(chosen)
    told = {reason: count for reason, count in sorted(dropped.items()) if count}
    read_from = {config.prompt_column, config.completion_column if config.completions else None}
    left_out = names - {name for line in chosen for name in line} - (read_from if config.format == "column" else set())
    counts = PromptCounts(read, len(chosen), told, sorted(left_out))
    if not chosen:
        raise ValueError(f"no row of {config.source} passes:\n{counts}")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(output, _with_unique_ids(chosen))
    write_json(output.with_suffix(".counts.json"), asdict(counts) | {"config": asdict(config)})
    return counts


def load_rows(source: str, split: str = "train", load: dict[str, Any] | None = None) -> Iterable[Row]:
    """Rows of a Hub data set, a folder or a file.

    Args:
        source: as `PromptsConfig.source`.
        split: of a Hub data set or folder with splits.
        load: further arguments of `datasets.load_dataset`.

    Raises:
        OSError: there is no such data set or file.
        ValueError: it has no such split, or cannot be read; the message says why.
    """
    path = Path(source)
    if path.suffix in (".jsonl", ".txt") and path.is_file() and not load:
        return _part({"train": [row for _, row in numbered_rows(source)]}, split, source)
    options: dict[str, Any] = {"split": split} | (load or {})
    suffix = Path(source.removesuffix(".gz").replace(".jsonl", ".json")).suffix
    if suffix in _BUILDERS:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {source}")
        options |= {"data_files": source}
    try:
        # What Dataset.save_to_disk and DatasetDict.save_to_disk write
        if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
            return cast(Dataset, load_dataset(_BUILDERS.get(suffix, source), **options))
        saved = load_from_disk(source)
    except (DatasetGenerationError, TypeError, ValueError) as error:
        raise ValueError(f"{source} cannot be read as a data set: {error.__cause__ or error}") from error
    return _part(saved if isinstance(saved, DatasetDict) else {str(saved.split or "train"): saved}, split, source)


def _part(splits: Mapping[str, Sequence[Row]], split: str, source: str) -> list[Row]:
    """The rows that `split` names in the notation of `datasets`, such as "train[:10%]+test"."""
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(sizes)}: {error}") from error
    return [splits[part.splitname][i] for part in parts for i in range(sizes[part.splitname])[part.from_ : part.to]]


def _passing(row: Row, config: PromptsConfig, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """The line for a row; raises `Dropped` if there is to be none."""
    format, limits = FORMATS[config.format], config.limits()
    columns = Columns(config.prompt_column, config.completion_column, config.template or None, config.style)
    example: Example = (format.pair if config.completions else format.prompt)(row, columns, limits)
    if tokenizer is not None:
        limits.check_tokens(sum(len(tokenizer(text)["input_ids"]) for text in _texts(example)))  # type: ignore[arg-type]
    missing = [name for name in config.keep if name not in row]
    if missing:
        raise ValueError(f"there is no column {missing[0]!r} to keep, only {', '.join(sorted(row))}")
    line: dict[str, Any] = {"id": row.get("id"), "prompt": example.prompt}
    if example.conversation is not None:
        line["conversation"] = example.conversation
    if example.completion is not None:
        line["completion"] = example.completion
    return line | example.columns | {name: row[name] for name in config.keep}


def _texts(example: Example) -> list[str]:
    return [turn["content"] for turn in example.conversation] if example.conversation else [example.prompt]


def _key(line: dict[str, Any]) -> str:
    """What makes a prompt the same as another."""
    return prompt_key(line["prompt"], line.get("conversation"))


def _with_unique_ids(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Lines whose id is their own if it is the first of its kind, else made from the prompt."""
    taken: set[str] = set()
    for line in lines:
        own = None if line["id"] is None else str(line["id"])
        if own is None or own in taken:
            own = prompt_id(line["prompt"], line.get("conversation"))
        taken.add(own)
        yield line | {"id": own}
