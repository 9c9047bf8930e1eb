"""What the three example rewards learn from, and the held-out slices they are measured on.

Every preference is a `Pair` of (prompt, reply) texts; humour is a `Labelled` text, whose label is the fraction of it
that is a joke. The same builders make training data and held-out slices: these differ in the split read and in how
replies are cut. Replies are judged on their first words, because a decoder is steered on short, often unfinished,
completions.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Text = tuple[str, str]  # prompt, reply
Cut = Callable[[str], str]

CUT_WORDS = 36  # about 48 SmolLM2 tokens, the length of completions in the experiments
CONTEXT_WORDS = 60  # of a dialogue's last turn

# Jokes about these are left out of what humour rewards.
CRUDE = re.compile(
    r"\b(sex\w*|porn\w*|rap(e|ed|es|ist)|nazis?|hitler|holocaust|racis\w+|black|mexicans?|jew\w*|muslims?|arabs?|gays?|lesbians?|"
    r"terroris\w+|suicid\w+|abortion\w*|pedo\w*|priests?|dick|penis\w*|vagina\w*|boobs?|breasts?|tits?|ass|asshole|shit\w*|"
    r"fuck\w*|bitch\w*|whore\w*|hookers?|blonde?s?|fat|retard\w*|cum|orgasm\w*|condoms?|naked|slut\w*|dead|kill\w*|murder\w*)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Pair:
    """`better` should score above `worse`; `slice` names the kind of comparison."""

    better: Text
    worse: Text
    slice: str


@dataclass(frozen=True)
class Labelled:
    """A text and the fraction of it, in [0, 1], that is of the wanted kind."""

    text: Text
    label: float
    slice: str


@dataclass(frozen=True)
class Collections:
    """One split of the source collections, as plain records."""

    helpful: list[dict]  # prompt, chosen, rejected: human preferences over ordinary replies
    hh: list[dict]  # messages, chosen, rejected: human preferences over replies to red-team dialogues
    xstest: list[dict] = field(repr=False)  # prompt, prompt_is_safe, reply, label (compliance, refusal, ...)
    humor: list[dict] = field(repr=False)  # text, humor (1: a joke, 0: a headline)


def read_records(path: Path) -> list[dict]:
    """The records of a collection, one a line.

    Raises:
        FileNotFoundError: naming the missing file and where it comes from.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: expected the collections that examples/rewards/README.md names")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_collections(data: Path, split: str) -> Collections:
    """Read the `"train"` or `"test"` split from a data folder; raises as `read_records`."""
    return Collections(
        helpful=read_records(data / f"helpful_pairs_{split}.jsonl"),
        hh=read_records(data / f"hh_harmless_{split}.jsonl"),
        xstest=[record for record in read_records(data / "xstest_completions.jsonl") if record["split"] == split],
        humor=read_records(data / f"humor_{split}.jsonl"),
    )


# ---- cutting ----


def first_words(text: str, count: int) -> str:
    """The text up to the end of its `count`-th word, white space kept."""
    ends = [match.end() for match in re.finditer(r"\S+", text)]
    return text if len(ends) <= count else text[: ends[count - 1]]


def last_words(text: str, count: int) -> str:
    """The last `count` words."""
    return " ".join(text.split()[-count:])


def whole(text: str) -> str:
    """No cut."""
    return text


def cut_short(text: str) -> str:
    """About 48 SmolLM2 tokens."""
    return first_words(text, CUT_WORDS)


def random_cut(rng: random.Random) -> Cut:
    """A cut that leaves a third of the texts long and the rest at 12 to 40 words, so that length tells little."""

    def cut(text: str) -> str:
        return first_words(text, 90 if rng.random() < 0.3 else rng.randint(12, 40))

    return cut


# ---- degenerate replies: what a steered small model finds first ----


def corrupt(text: Text, rng: random.Random) -> Text:
    """A degenerate variant of a reply: empty, looping, shuffled, an echo of the prompt, or noise.

    The result never equals the reply, so that a pair of both is a preference.
    """
    prompt, reply = text
    words = reply.split() or ["the"]
    kind = rng.choice(["empty", "word", "loop", "loop", "tail", "shuffle", "shuffle", "echo", "noise", "mixed"])
    length = max(8, min(len(words), CUT_WORDS))
    start = rng.randint(0, max(0, len(words) - 4))
    phrase = words[start : start + rng.randint(1, 6)]
    if kind == "empty":
        bad = rng.choice(["", ".", words[0]])
    elif kind == "word":
        bad = " ".join([rng.choice(words)] * length)
    elif kind == "loop":
        bad = " ".join([*words[: rng.randint(0, 10)], *phrase * length][:length])
    elif kind == "tail":
        bad = " ".join([*words[: length // 2], *phrase * length][:length])
    elif kind == "echo" and prompt:
        bad = " ".join([prompt] * rng.randint(1, 2))
    elif kind == "noise":
        bad = " ".join(rng.choice(["!", "...", "?", "-", "*", "no", "a", "1", ",", "the"]) for _ in range(length))
    elif kind == "mixed":
        pool = [*words, *prompt.split(), "of", "the", "and", "!", "who"]
        bad = " ".join(rng.sample(pool, min(length, len(pool))))
    else:
        bad = " ".join(rng.sample(words[:length], min(length, len(words))))
    return (prompt, bad) if bad.split() != reply.split() else (prompt, "")


def degenerate_pairs(texts: Iterable[Text], rng: random.Random) -> Iterator[Pair]:
    """Each text above a corrupted version of itself."""
    for text in texts:
        yield Pair(text, corrupt(text, rng), "degenerate")


# ---- helpful ----


def replies_by_label(xstest: list[dict], label: str, safe: bool) -> dict[str, list[str]]:
    """XSTest replies of one human label, by prompt, for safe or for unsafe prompts."""
    found: dict[str, list[str]] = {}
    for record in xstest:
        if record["label"] == label and bool(record["prompt_is_safe"]) == safe:
            found.setdefault(record["prompt"], []).append(record["reply"])
    return found


def paired(better: dict[str, list[str]], worse: dict[str, list[str]], cut: Cut, name: str) -> list[Pair]:
    """Every better reply with a worse one to the same prompt (each better reply once, worse ones in turn)."""
    return [
        Pair((prompt, cut(reply)), (prompt, cut(worse[prompt][i % len(worse[prompt])])), name)
        for prompt, replies in better.items()
        if prompt in worse
        for i, reply in enumerate(replies)
    ]


def helpful_pairs(data: Collections, cut: Cut, rng: random.Random) -> list[Pair]:
    """Preferences for `helpful`: on topic, answering, whole, human-preferred, not degenerate."""
    pairs: list[Pair] = []
    refusals = [r["reply"] for r in data.xstest if r["label"] == "refusal"]
    records = [r for r in data.helpful if r["chosen"].split()]
    others = rng.sample(records, len(records))
    for record, other in zip(records, others, strict=True):
        prompt, reply = record["prompt"], cut(record["chosen"])
        if other["prompt"] != prompt:
            pairs.append(Pair((prompt, reply), (prompt, cut(other["chosen"])), "own reply over another prompt's"))
        if rng.random() < 0.3:
            pairs.append(Pair((prompt, reply), (prompt, cut(rng.choice(refusals))), "answer over refusal"))
        if rng.random() < 0.4 and len(reply.split()) >= 12:
            count = round(len(reply.split()) * rng.uniform(0.15, 0.6))
            pairs.append(Pair((prompt, reply), (prompt, first_words(reply, count)), "full over truncated"))
        if cut(record["chosen"]) != cut(record["rejected"]):
            pairs.append(Pair((prompt, reply), (prompt, cut(record["rejected"])), "human preference"))
    complied = replies_by_label(data.xstest, "compliance", safe=True)
    pairs += paired(
        complied, replies_by_label(data.xstest, "refusal", safe=True), cut, "XSTest safe: compliance over refusal"
    )
    texts = [(r["prompt"], cut(r["chosen"])) for r in rng.sample(records, len(records) // 2)]
    return pairs + list(degenerate_pairs(texts, rng))


# ---- harmless ----


def dialogue_prompt(messages: list[dict]) -> str:
    """The last human turn of a dialogue; of a long one, its end."""
    return last_words(messages[-1]["content"], CONTEXT_WORDS)


def harmless_pairs(data: Collections, cut: Cut, rng: random.Random) -> list[Pair]:
    """Preferences for `harmless`: human ones, refusal over harm, an innocent answer over harm, not degenerate."""
    human: list[Pair] = []
    for record in data.hh:
        prompt = dialogue_prompt(record["messages"])
        better, worse = cut(record["chosen"]), cut(record["rejected"])
        if better != worse:
            human.append(Pair((prompt, better), (prompt, worse), "human preference (HH)"))
    refused = replies_by_label(data.xstest, "refusal", safe=False)
    complied = replies_by_label(data.xstest, "compliance", safe=False)
    refusals = paired(refused, complied, cut, "XSTest unsafe: refusal over compliance")
    innocent = [(r["prompt"], cut(r["chosen"])) for r in rng.sample(data.helpful, len(data.helpful))]
    harmful = [(prompt, cut(reply)) for prompt, replies in complied.items() for reply in replies] + [
        p.worse for p in human
    ]
    across = [
        Pair(good, bad, "innocent answer over harmful one")
        for good, bad in zip(innocent, rng.sample(harmful, min(len(harmful), len(human) // 2)), strict=False)
    ]
    texts = [p.better for p in rng.sample(human, len(human) // 3)] + innocent[-len(human) // 3 :]
    return human + refusals + across + list(degenerate_pairs(texts, rng))


# ---- humour ----


def join_some(texts: list[str], rng: random.Random) -> str:
    """One to three of the texts in a row, so that jokes and headlines come at the length of a reply."""
    return " ".join(rng.sample(texts, rng.choice([1, 1, 2, 3])))


def mixture(joke: str, plain: str, rng: random.Random) -> tuple[str, float]:
    """A reply that is partly a joke, and the fraction of its words that are."""
    funny, dull = len(joke.split()), len(plain.split())
    parts = [joke, plain] if rng.random() < 0.5 else [plain, joke]
    return " ".join(parts), funny / max(1, funny + dull)


def humour_texts(data: Collections, cut: Cut, rng: random.Random, count: int, crude: bool = False) -> list[Labelled]:
    """About `count` labelled texts: jokes, headlines, ordinary replies, mixtures, degenerate versions of all.

    The prompt is empty throughout: humour is a matter of the reply alone. `crude` keeps jokes that training leaves out.
    """
    jokes = [r["text"] for r in data.humor if r["humor"] and (crude or not CRUDE.search(r["text"]))]
    headlines = [r["text"] for r in data.humor if not r["humor"]]
    replies = [r["chosen"] for r in [*data.helpful, *data.hh] if r["chosen"].split()]

    def reply() -> str:
        return cut(first_words(rng.choice(replies), rng.randint(6, CUT_WORDS)))

    rows: list[Labelled] = []
    for _ in range(count // 10):
        jokes_here = [cut(join_some(jokes, rng)) for _ in range(3)]
        plain = [cut(join_some(headlines, rng)), cut(join_some(headlines, rng)), reply(), reply()]
        rows += [Labelled(("", text), 1.0, "joke") for text in jokes_here]
        rows += [Labelled(("", text), 0.0, "headline") for text in plain[:2]]
        rows += [Labelled(("", text), 0.0, "ordinary reply") for text in plain[2:]]
        for _ in range(2):
            mixed, label = mixture(rng.choice(jokes), first_words(reply(), rng.randint(4, 24)), rng)
            rows.append(Labelled(("", mixed), label, "mixture"))
        rows.append(Labelled(corrupt(("", rng.choice([*jokes_here, *plain])), rng), 0.0, "degenerate"))
    return rows
