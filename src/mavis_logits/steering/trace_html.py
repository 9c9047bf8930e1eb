"""The page of a trace (`MavisTrace.to_html`): tokens coloured by their tilt, with their candidates on hover."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from .step import TraceStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 20  # candidates of a token on the page
UNKNOWN = -1
_CONTEXT = 8  # tokens of the prompt that decide how the first new one is spelled
_BROKEN = "\ufffd"  # what tokenizers write for bytes that are no whole character
_SIGNS = {"\n": "↵\n", "\t": "⇥\t"}
_JOINERS = "\u200c\u200d"  # invisible, but part of words and emoji


@dataclass(frozen=True)
class Candidate:
    """A token that was to be chosen from; probabilities before and after the tilt, values [M] (NaN: not run)."""

    text: str
    id: int
    before: float
    after: float
    log_ratio: float
    values: list[float]
    taken: bool


@dataclass(frozen=True)
class Token:
    """A token, as it stands in the text and by itself, and its step.

    `log_ratio` is None where it is not known; `others` is the probability of all that are no candidates here.
    """

    text: str
    name: str
    id: int
    log_ratio: float | None
    kl: float
    beta: float
    candidates: list[Candidate]
    others_before: float
    others_after: float


@dataclass(frozen=True)
class Row:
    """A sequence: its prompt, empty if not known, and the tokens steered."""

    prompt: str
    tokens: list[Token]

    @property
    def kl(self) -> float:
        """Sum of the steps' divergences, in nats."""
        return sum(token.kl for token in self.tokens)

    @property
    def log_ratio(self) -> float | None:
        """log(pi / pi_ref) of the row, None if a token's is unknown."""
        ratios = [token.log_ratio for token in self.tokens if token.log_ratio is not None]
        return math.fsum(ratios) if len(ratios) == len(self.tokens) else None


def render_page(
    objectives: Sequence[str],
    steps: Sequence[TraceStep],
    eos_token_ids: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
    sequences: Tensor | None = None,
) -> str:
    """The page of a trace's steps; the other arguments and errors as for `MavisTrace.to_html`."""
    speller = Speller(tokenizer)
    steps = _steps(steps, sequences)
    rows = []
    for number in range(len(steps[0].live)):
        prompt = [] if sequences is None else speller.without_padding(sequences[number, : steps[0].length].tolist())
        rows.append(_row(steps, number, prompt, eos_token_ids, speller))
    tokens = [token for row in rows for token in row.tokens]
    return (
        _templates()
        .get_template("trace_page.html")
        .render(
            objectives=objectives,
            rows=rows,
            ratio_scale=_scale(token.log_ratio for token in tokens if token.log_ratio is not None),
            kl_scale=_scale(token.kl for token in tokens),
        )
    )


class Written:
    """A sequence while it is being written: the `Token` of every step as soon as it is known.

    Args:
        tokenizer: the base model's.
        prompt: token ids that the sequence goes on from.
        shown: candidates of a token that are kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], shown: int = SHOWN) -> None:
        self._speller, self._prompt, self._shown = Speller(tokenizer), list(prompt), shown
        self._ids: list[int] = []
        self.tokens: list[Token] = []

    def add(self, step: TraceStep, token: int) -> None:
        """Append a token and the step (of one row) that it was chosen in."""
        self._ids.append(token)
        text = self._speller.running(self._ids, self._prompt)[-1]
        taken = torch.full_like(step.candidates[:, 0], token)
        self.tokens.append(_token(_shown(step, taken, self._shown), 0, token, text, self._speller))

    def html(self, objectives: Sequence[str], first: int = 1, cards: bool = True, ratio_scale: float = 3.0) -> str:
        """The tokens as a part of a page, coloured by how much each was tilted; its style is `parts_style`.

        Args:
            objectives: names of the M values.
            first: number of the first token's card, where a page has several texts.
            cards: whether each token has a card that shows on hover what it was chosen from.
            ratio_scale: nats that get the full colour.
        """
        parts: Any = _templates().get_template("trace_parts.html").module
        row = Row("", self.tokens)
        return str(parts.text(row, first, objectives, ratio_scale, _scale(t.kl for t in self.tokens), cards))


def parts_style() -> str:
    """The style of `Written.html`; the page sets its colours: --up, --down, --line, --text, --quiet, --raised."""
    parts: Any = _templates().get_template("trace_parts.html").module
    return str(parts.style())


@cache
def _templates() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "signed": signed, "value": value}
    return environment


def _steps(traced: Sequence[TraceStep], sequences: Tensor | None) -> list[TraceStep]:
    """The steps that led to the result, on the CPU, with the candidates to be shown and the tokens of `sequences`."""
    if not traced:
        raise ValueError("the trace holds no steps: generate with trace=True first")
    counts = sorted({len(step.live) for step in traced})
    if len(counts) > 1:
        raise ValueError(f"the trace holds steps of {counts} rows: call reset() before generating with another batch")
    if sequences is None:
        return [_shown(step, step.taken) for step in traced]
    if not isinstance(sequences, Tensor) or sequences.ndim != 2 or sequences.is_floating_point():
        raise ValueError(
            "sequences must be the token ids [rows, length] that the traced call returned (of an output with "
            f"return_dict_in_generate, its .sequences), got {getattr(sequences, 'shape', type(sequences).__name__)}"
        )
    (rows, width), first, last = sequences.shape, traced[0].length, traced[-1].length
    if rows != counts[0] or not first < width <= last + 1:
        raise ValueError(
            f"sequences are {rows} rows x {width} tokens, but the trace holds {counts[0]} rows of {first + 1} to "
            f"{last + 1}: pass what the traced call returned, prompts included. A trace of beam search, whose rows are "
            "beams that change places, has no such page"
        )
    kept = [step for step in traced if step.length < width]  # later ones were for drafts that were rejected
    for t, step in enumerate(kept[:-1]):  # the last may have been recorded as a draft that was rejected in the end
        followed = sequences[:, step.length].to(step.taken.device)
        differs = step.live & (step.taken != UNKNOWN) & (step.taken != followed)
        if differs.any():
            row = int(torch.nonzero(differs)[0])
            raise ValueError(
                f"sequences are of another call than the trace: new token {t} of row {row} is {int(followed[row])}, "
                f"but the trace saw {int(step.taken[row])}"
            )
    return [_shown(step, sequences[:, step.length]) for step in kept]


def _shown(step: TraceStep, taken: Tensor, count: int = SHOWN) -> TraceStep:
    """`step` with these tokens taken, cut down to the candidates that the page shows, on the CPU."""
    part = replace(step, taken=taken.to(step.candidates.device)).narrow(count)
    tensors: dict[str, Any] = {name: each.cpu() for name, each in vars(part).items() if isinstance(each, Tensor)}
    return replace(part, **tensors)


def _row(
    steps: list[TraceStep], number: int, prompt: list[int], eos_token_ids: frozenset[int], speller: Speller
) -> Row:
    """Row `number` of the page, up to its end."""
    steps = [step for step in steps if step.live[number]]
    ids = [int(step.taken[number]) for step in steps]
    ids = ids[: next((t + 1 for t, token in enumerate(ids) if token in eos_token_ids), len(ids))]
    known = ids.index(UNKNOWN) if UNKNOWN in ids else len(ids)  # what follows a gap is spelled by itself
    texts = speller.running(ids[:known], prompt) + [speller.name(token) for token in ids[known:]]
    tokens = [_token(step, number, token, text, speller) for step, token, text in zip(steps, ids, texts, strict=False)]
    return Row(visible(speller.text(prompt)), tokens)


def _token(step: TraceStep, row: int, token: int, text: str, speller: Speller) -> Token:
    candidates = _candidates(step, row, speller)
    return Token(
        text=visible(text),
        name=speller.candidate(token),
        id=token,
        log_ratio=next((each.log_ratio for each in candidates if each.taken), _of_others(step, row)),
        kl=max(0.0, float(step.kl[row])),
        beta=float(step.beta[row]),
        candidates=candidates,
        others_before=_others(each.before for each in candidates),
        others_after=_others(each.after for each in candidates),
    )


def _of_others(step: TraceStep, row: int) -> float | None:
    """Log-ratio of a token that was no candidate but kept a probability."""
    if step.others is None or int(step.taken[row]) == UNKNOWN or not math.isfinite(float(step.others[row])):
        return None
    return float(step.others[row])


def _candidates(step: TraceStep, row: int, speller: Speller) -> list[Candidate]:
    """The candidates of a row that the base model could have taken, likeliest first."""
    columns = (step.candidates, step.reference.double(), step.tilted.double(), step.values)
    candidates = [
        Candidate(
            text=speller.candidate(token),
            id=token,
            before=math.exp(before),
            after=math.exp(after),
            log_ratio=after - before,
            values=values,
            taken=token == int(step.taken[row]),
        )
        for token, before, after, values in zip(*(column[row].tolist() for column in columns), strict=True)
        if before > -math.inf
    ]
    return sorted(candidates, key=lambda each: (-each.after, -each.before))


def _others(probabilities: Iterable[float]) -> float:
    """What is left of 1, nothing if float32 could not tell it from nothing."""
    left = 1.0 - math.fsum(probabilities)
    return left if left > 1e-6 else 0.0


class Speller:
    """What tokens look like, one by one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def text(self, ids: Sequence[int]) -> str:
        """The text of a run of tokens, special ones included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def running(self, ids: Sequence[int], prompt: Sequence[int]) -> list[str]:
        """The text that each token adds to those before it; of a character in several tokens, the last has it all."""
        context = list(prompt[-_CONTEXT:])
        every = context + list(ids)
        texts, start, read = [], 0, len(context)
        for end in range(len(context) + 1, len(every) + 1):
            before, whole = self.text(every[start:read]), self.text(every[start:end])
            if whole.endswith(_BROKEN):
                texts.append(_BROKEN)
            else:
                texts.append(whole[len(before) :])
                start, read = read, end
        return texts

    def name(self, token: int) -> str:
        """The text of a token by itself."""
        if token not in self._names:
            self._names[token] = "?" if token == UNKNOWN else self._spell(token)
        return self._names[token]

    def candidate(self, token: int) -> str:
        """The text of a token on one line, with its spaces to be seen."""
        return visible(self.name(token)).replace("\n", "").replace("\t", "").replace(" ", "␣")

    def without_padding(self, ids: list[int]) -> list[int]:
        """`ids` without leading padding."""
        start = next((i for i, token in enumerate(ids) if token != self._tokenizer.pad_token_id), 0)
        return ids[start:]

    def _spell(self, token: int) -> str:
        text = self.text([token, token])[len(self.text([token])) :]  # as a second token it keeps its leading space
        if text and _BROKEN not in text:
            return text
        return _BROKEN + (self._tokenizer.convert_ids_to_tokens(token) or "")  # bytes, or beyond the vocabulary


def visible(text: str) -> str:
    """`text` with a sign before each line break and tab, and other control characters spelled out: none acts."""
    return "".join(_SIGNS.get(c) or (c if _prints(c) else c.encode("unicode_escape").decode()) for c in text)


def _prints(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def percent(probability: float) -> str:
    """A probability in per cent, to about two digits."""
    share = 100 * probability
    if 0 < share < 0.01:
        return "<0.01 %"
    digits = 2 if 0 < share < 0.095 else 1 if 0 < share < 9.95 or 99.5 <= share < 99.95 else 0
    return f"{share:.{digits}f} %"


def signed(number: float) -> str:
    """A number of nats with its sign."""
    return "−∞" if number == -math.inf else _minus(f"{number:+z.2f}")


def value(number: float) -> str:
    """A value in reward units, a dash for NaN."""
    return "–" if math.isnan(number) else _minus(f"{number:z.3f}")


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _scale(numbers: Iterable[float]) -> int:
    """The magnitude that gets the full colour: the largest finite one, rounded up, of at least 1 nat."""
    finite = [abs(number) for number in numbers if math.isfinite(number)]
    return max(1, math.ceil(max(finite, default=1.0)))
