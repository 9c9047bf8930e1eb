"""The page of a trace: what it says, and that nothing which a model may write can act on it."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from mavis_logits import MavisLogitsProcessor
from mavis_logits.decoding.strategies import MavisSampling
from mavis_logits.steering.trace import MavisTrace
from mavis_logits.steering.trace_html import SHOWN, Speller, percent, signed, value, visible
from tiny import EOS, PAD, VOCABULARY, make_base, make_head

PROMPT = [5, 6]
NASTY = "</div><script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\"> & {{ 7 * 7 }}"
VOID = {"meta", "input"}


def word_tokenizer(words: dict[int, str] | None = None) -> PreTrainedTokenizerFast:
    """Word `w<id>` for every id, or the word given; decoded without spaces between."""
    vocabulary = {(words or {}).get(i, f"w{i}"): i for i in range(VOCABULARY)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w3"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def make_trace(*taken: list[int], objectives: tuple[str, ...] = ("a", "b"), k: int = 4, **changed: Any) -> MavisTrace:
    """One step for each list of tokens [R] taken, after PROMPT, over the candidates 1 to k.

    Before the tilt a candidate has probability 0.05, after it in proportion to its id; values are the id, and minus it.
    """
    trace = MavisTrace(list(objectives), frozenset({EOS}))
    for t, tokens in enumerate(taken):
        rows = len(tokens)
        candidates = torch.arange(1, k + 1).expand(rows, k)
        numbers = candidates.float()
        step = {
            "length": len(PROMPT) + t,
            "live": torch.ones(rows, dtype=torch.bool),
            "candidates": candidates,
            "reference": torch.full((rows, k), math.log(0.05)),
            "tilted": (numbers / numbers.sum(1, keepdim=True)).log(),
            "values": torch.stack([numbers, -numbers], dim=2)[..., : len(objectives)],
            "beta": torch.full((rows,), 5.0),
            "kl": torch.full((rows,), 0.25),
            "taken": torch.tensor(tokens),
        }
        trace.add(**(step | changed))
    return trace


class Page(HTMLParser):
    """Texts of the page's tokens, cells of their tables, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.tokens: list[str] = []
        self.styles: list[str] = []
        self.classes: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.prompts: list[str] = []
        self.headings: list[str] = []
        self.cards: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.attributes |= set(attributes)
        classes = (attributes.get("class") or "").split()
        if "token" in classes:
            self.tokens.append("")
            self.styles.append(attributes["style"] or "")
            self.classes.append(classes[1])
            self.tables.append([])
            assert attributes["tabindex"] == "0"
        for name, texts in (("card", self.cards), ("prompt", self.prompts), ("h2", self.headings)):
            if name == tag or name in classes:
                texts.append("")
        if tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        classes = [(attributes.get("class") or "").split()[:1] for _, attributes in self.open]
        if "td" in inside or "th" in inside:
            self.tables[-1][-1][-1] += data
        elif ["card"] in classes:
            self.cards[-1] += data
        elif ["token"] in classes:
            self.tokens[-1] += data
        elif ["prompt"] in classes:
            self.prompts[-1] += data
        elif "h2" in inside:
            self.headings[-1] += data


def test_a_page_says_what_the_trace_holds() -> None:
    page = Page(make_trace([4, 1], [2, PAD]).to_html(word_tokenizer()))
    assert page.tokens == ["w4", "w2", "w1"]  # the second row ended with EOS
    assert page.classes == ["up", "up", "up"]
    assert [" ".join(heading.split()) for heading in page.headings] == [
        f"Row 0 2 tokens, step KL in all 0.50 nats, log-ratio in all +{math.log(8) + math.log(4):.2f} nats",
        f"Row 1 1 token, step KL in all 0.25 nats, log-ratio in all +{math.log(2):.2f} nats",
    ]
    header, *candidates, others = page.tables[0]
    assert header == ["candidate", "id", "before", "after", "log-ratio", "a", "b"]
    assert candidates[0] == ["w4", "4", "5.0 %", "40 %", "+2.08", "4.000", "−4.000"]
    assert [row[0] for row in candidates] == ["w4", "w3", "w2", "w1"]
    assert others == ["all others", "", "80 %", "0 %", "", "", ""]
    assert "step KL 0.25 nats, beta 5" in page.cards[0]


def test_colour_grows_with_the_log_ratio_and_knows_its_sign() -> None:
    reference = torch.tensor([[0.2, 0.1, 0.3, 0.4]]).log()
    tilted = torch.tensor([[0.1, 0.8, 0.1, 0.0]]).log()
    page = Page(make_trace([2], [3], [1], reference=reference, tilted=tilted).to_html(word_tokenizer()))
    assert page.classes == ["up", "down", "down"]
    assert page.styles == ["--t:0.69;--k:0.25", "--t:0.37;--k:0.25", "--t:0.23;--k:0.25"]  # of 3 nats, and of 1 nat
    assert page.tables[0][4] == ["w4", "4", "40 %", "0 %", "−∞", "4.000", "−4.000"]


def test_values_that_were_not_computed_and_candidates_that_never_could_be_taken() -> None:
    values = torch.tensor([[[1.0, math.nan]] * 4])
    reference = torch.tensor([[-math.inf, -1.0, -2.0, -3.0]])
    tilted = torch.tensor([[-math.inf, -1.0, -2.0, -3.0]])
    page = Page(make_trace([2], values=values, reference=reference, tilted=tilted).to_html(word_tokenizer()))
    assert [row[0] for row in page.tables[0][1:-1]] == ["w2", "w3", "w4"]
    assert page.tables[0][1][5:] == ["1.000", "–"]


def test_the_last_token_comes_from_the_sequences_and_so_do_the_prompts() -> None:
    trace = make_trace([3, 2], [-1, -1])
    page = Page(trace.to_html(word_tokenizer()))
    assert page.tokens == ["w3", "?", "w2", "?"]
    assert page.classes == ["up", "unknown", "up", "unknown"]
    assert "token not known" in page.cards[1]
    assert "log-ratio" not in page.headings[0]
    page = Page(trace.to_html(word_tokenizer(), sequences=torch.tensor([[PAD, 6, 3, 4], [5, 6, 2, EOS]])))
    assert page.tokens == ["w3", "w4", "w2", "w1"]
    assert page.prompts == ["w6", "w5w6"]


def test_a_token_that_was_no_candidate_has_no_colour() -> None:
    page = Page(make_trace([9]).to_html(word_tokenizer()))
    assert page.tokens == ["w9"]
    assert page.classes == ["unknown"]
    assert "none of the candidates" in page.cards[0]


def test_of_many_candidates_the_likeliest_before_and_after_are_shown_and_the_one_taken() -> None:
    k = 90
    reference = torch.linspace(0, -9, k).log_softmax(0)[None]
    page = Page(make_trace([45], k=k, reference=reference).to_html(word_tokenizer()))
    shown = {int(row[1]) for row in page.tables[0][1:-1]}
    assert len(shown) == SHOWN
    assert shown > {45, 1, 2, 3, 88, 89, 90}


def test_an_ended_row_and_rejected_drafts_leave_no_token() -> None:
    trace = make_trace([3, 1])
    trace.add(**vars(make_trace([2, PAD])[0]) | {"length": 3, "live": torch.tensor([True, False])})
    assert Page(trace.to_html(word_tokenizer())).tokens == ["w3", "w2", "w1"]
    drafted = make_trace([3], [2], [4], [-1])
    page = Page(drafted.to_html(word_tokenizer(), sequences=torch.tensor([[*PROMPT, 3, 1]])))
    assert page.tokens == ["w3", "w1"]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (torch.tensor([[5, 6, 3, 4]]), r"1 rows x 4 tokens, but the trace holds 2 rows of 3 to 4: .* beam search"),
        (torch.tensor([[5, 6]] * 2), "2 rows x 2 tokens"),
        (torch.tensor([[5, 6, 3, 4, 4]] * 2), "2 rows x 5 tokens"),
        (torch.tensor([[5, 6, 3, 4]] * 2), "of another call than the trace: new token 0 of row 1 is 3, but .* saw 2"),
        (torch.tensor([[5.0, 6.0, 3.0, 4.0]] * 2), "must be the token ids"),
        ({"sequences": 1}, r"its \.sequences\), got dict"),
    ],
)
def test_sequences_of_another_call_are_refused(sequences: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trace([3, 2], [4, 4]).to_html(word_tokenizer(), sequences=sequences)


def test_an_empty_trace_and_one_of_two_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="generate with trace=True first"):
        MavisTrace(["a"]).to_html(word_tokenizer())
    trace = make_trace([3, 2])
    trace.add(**vars(make_trace([3])[0]) | {"length": 3})
    with pytest.raises(ValueError, match=r"steps of \[1, 2\] rows: call reset"):
        trace.to_html(word_tokenizer())


def test_the_file_is_the_page(tmp_path: Path) -> None:
    trace = make_trace([3])
    page = trace.to_html(word_tokenizer({3: "naïve 汉字 🙂"}), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert "naïve 汉字 🙂" in page
    with pytest.raises(OSError, match=r"make the folder .*nowhere first"):
        trace.to_html(word_tokenizer(), tmp_path / "nowhere" / "page.html")


def test_the_page_stands_alone() -> None:
    text = make_trace([3]).to_html(word_tokenizer())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "action"} & page.attributes
    assert not [name for name in page.attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


@given(st.text(min_size=1).filter(lambda text: text not in {f"w{i}" for i in range(VOCABULARY)}))
def test_no_token_or_name_changes_the_structure_of_the_page(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    plain = Page(make_trace([3], [4], objectives=("a",)).to_html(word_tokenizer()))
    sequences = torch.tensor([[5, 3, 3, 4]])
    page = Page(make_trace([3], [4], objectives=(text,)).to_html(word_tokenizer({3: text}), sequences=sequences))
    with_prompt = [*plain.tags]
    with_prompt.insert(plain.tags.index("h2") + 2, "div")
    assert page.tags == with_prompt
    assert page.attributes == plain.attributes | {"dir"}


def test_markup_and_templates_in_tokens_are_text() -> None:
    page = Page(make_trace([3], [4], objectives=(NASTY, "b")).to_html(word_tokenizer({3: NASTY})))
    assert page.tokens == [NASTY, "w4"]
    assert page.tables[0][0][5] == NASTY
    assert page.tables[0][2][0] == NASTY.replace(" ", "␣")
    assert "script" not in page.tags


def test_line_breaks_show_and_control_characters_do_not_act() -> None:
    words = {2: "\n", 3: " a\tb\r", 4: "\u202eevil\x00"}
    page = Page(make_trace([2], [3], [4]).to_html(word_tokenizer(words)))
    assert page.tokens == ["↵\n", " a⇥\tb\\r", "\\u202eevil\\x00"]
    assert [row[0] for row in page.tables[0][1:-1]] == ["\\u202eevil\\x00", "␣a⇥b\\r", "↵", "w1"]


@given(st.text())
def test_what_is_visible_can_be_told_and_acts_no_more(text: str) -> None:
    shown = visible(text)
    assert all(c.isprintable() or c in "\n\t\u200c\u200d" or not c.isascii() for c in shown)
    assert "\u202e" not in shown
    assert shown.count("\n") == text.count("\n")
    if text.isprintable():
        assert shown == text


@given(st.text(), st.text())
def test_running_text_is_the_whole_text_token_by_token(prompt: str, text: str) -> None:
    tokenizer = byte_tokenizer()
    prompt, text = (each.encode("utf-8", "replace").decode().replace("\ufffd", "") for each in (prompt, text))
    ids = tokenizer.encode(text)
    pieces = Speller(tokenizer).running(ids, tokenizer.encode(prompt))
    assert len(pieces) == len(ids) == len(text.encode())
    assert "".join(piece for piece in pieces if piece != "\ufffd") == text


def test_bytes_and_tokens_beyond_the_vocabulary_have_names() -> None:
    tokenizer = byte_tokenizer()
    speller = Speller(tokenizer)
    first = tokenizer.encode("é")[0]
    assert speller.candidate(first) == "\ufffdÃ"
    assert speller.candidate(tokenizer.encode(" ")[0]) == "␣"
    assert speller.candidate(1000) == "\ufffd"
    assert speller.candidate(-1) == "?"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(0.0), "0 %"),
        (percent(0.00001), "<0.01 %"),
        (percent(0.0004), "0.04 %"),
        (percent(0.004), "0.4 %"),
        (percent(0.4), "40 %"),
        (percent(0.998), "99.8 %"),
        (percent(1.0), "100 %"),
        (signed(-0.001), "+0.00"),
        (signed(-1.5), "−1.50"),
        (signed(-math.inf), "−∞"),
        (value(-0.25), "−0.250"),
        (value(math.nan), "–"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    assert shown == expected


@pytest.mark.parametrize("top_k", [6, None])
@pytest.mark.parametrize("kind", [MavisLogitsProcessor, MavisSampling])
def test_a_steered_generation_has_a_page(kind: Any, top_k: int | None, prompts: dict[str, torch.Tensor]) -> None:
    base = make_base()
    mavis = kind(make_head(base, "a", "b"), model=base, top_k=top_k, pad_token_id=PAD, eos_token_id=EOS, trace=True)
    way = {"custom_generate": mavis} if kind is MavisSampling else {"logits_processor": [mavis]}
    torch.manual_seed(0)
    out = base.generate(**prompts, do_sample=True, max_new_tokens=40, **way)
    assert mavis.trace is not None
    page = Page(mavis.trace.to_html(word_tokenizer(), sequences=out))
    completions = [row[prompts["input_ids"].shape[1] :].tolist() for row in out]
    kept = [row[: row.index(EOS) + 1] if EOS in row else row for row in completions]
    assert page.tokens == [f"w{token}" for row in kept for token in row]
    ratios = mavis.trace.log_ratios(out[:, 5:]).double().sum(1)
    for heading, ratio in zip(page.headings, ratios.tolist(), strict=True):
        shown = re.search(r"log-ratio in all (\S+) nats", heading)
        assert shown
        assert float(shown[1].replace("−", "-")) == pytest.approx(ratio, abs=0.006)
    assert len(page.tables[0]) == (6 if top_k else SHOWN) + 2


@pytest.mark.slow
def test_in_a_browser_no_script_runs(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here")
    page = make_trace([3], objectives=(NASTY, "b")).to_html(word_tokenizer({3: NASTY}))
    unescaped = page.replace("</main>", NASTY + "</main>")
    allowed = unescaped.replace("Content-Security-Policy", "nothing")
    for text, title in ((page, "Steered text"), (unescaped, "Steered text"), (allowed, "ran")):
        (tmp_path / "page.html").write_text(text, encoding="utf-8")
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        url = (tmp_path / "page.html").as_uri()
        done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True)
        assert f"<title>{title}</title>" in done.stdout
