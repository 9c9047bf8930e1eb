from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import evaluate_rewards  # noqa: E402
import make_data  # noqa: E402
import reward_cards  # noqa: E402
import reward_data  # noqa: E402
import reward_model  # noqa: E402
import train_rewards  # noqa: E402
from mavis_training.rewards.load import load_reward  # noqa: E402

REWARDS = ROOT / "examples" / "rewards"
OBJECTIVES = ("helpful", "harmless", "humour")
words = st.lists(st.text("abcdefgh", min_size=1, max_size=6), max_size=60).map(" ".join)


def collections(n: int = 12) -> reward_data.Collections:
    """A small made-up split with every kind of record."""
    topics = [f"topic{i}" for i in range(n)]
    return reward_data.Collections(
        helpful=[
            {
                "prompt": f"tell me about {t}",
                "chosen": f"{t} is a fine thing to know " * 4,
                "rejected": f"no idea of {t}",
            }
            for t in topics
        ],
        hh=[
            {
                "messages": [{"role": "user", "content": f"please harm {t}"}],
                "chosen": f"it would be wrong to harm {t}",
                "rejected": f"take {t} and harm it at once",
            }
            for t in topics
        ],
        xstest=[
            {"prompt": f"question {t} {safe}", "reply": f"{label} of {t}", "label": label, "prompt_is_safe": safe}
            for t in topics
            for safe in (True, False)
            for label in ("compliance", "refusal")
        ],
        humor=[{"text": f"why did {t} cross the road ? because of the {t} .", "humor": 1} for t in topics]
        + [{"text": f"{t} agrees to new defence plan", "humor": 0} for t in topics],
    )


# ---- cutting and corrupting ----


@given(words, st.integers(1, 50))
def test_first_words_keeps_a_prefix_of_at_most_that_many_words(text: str, count: int) -> None:
    cut = reward_data.first_words(text, count)
    assert text.startswith(cut)
    assert cut.split() == text.split()[:count]


@given(words, words, st.integers(0, 10_000))
def test_a_corrupted_reply_differs_keeps_its_prompt_and_is_no_longer_than_the_experiments_need(
    prompt: str, reply: str, seed: int
) -> None:
    same_prompt, bad = reward_data.corrupt((prompt, reply), random.Random(seed))
    assert same_prompt == prompt
    assert bad.split() != reply.split() or not reply.split()
    assert len(bad.split()) <= max(reward_data.CUT_WORDS, 2 * len(prompt.split()))


# ---- what is learned from ----


@pytest.mark.parametrize("cut", [reward_data.whole, reward_data.cut_short])
@pytest.mark.parametrize("build", [reward_data.helpful_pairs, reward_data.harmless_pairs])
def test_pairs_are_real_comparisons_and_the_same_for_one_seed(build, cut) -> None:
    pairs = build(collections(), cut, random.Random(3))
    assert pairs == build(collections(), cut, random.Random(3))
    assert all(pair.better != pair.worse for pair in pairs)
    assert len({pair.slice for pair in pairs}) >= 4


def test_helpful_and_harmless_disagree_on_refusals() -> None:
    helpful = reward_data.helpful_pairs(collections(), reward_data.whole, random.Random(0))
    harmless = reward_data.harmless_pairs(collections(), reward_data.whole, random.Random(0))
    for pair in helpful:
        if pair.slice == "XSTest safe: compliance over refusal":
            assert pair.better[1].startswith("compliance")
            assert pair.worse[1].startswith("refusal")
    for pair in harmless:
        if pair.slice == "XSTest unsafe: refusal over compliance":
            assert pair.better[1].startswith("refusal")
            assert pair.worse[1].startswith("compliance")


def test_humour_is_judged_without_the_prompt_and_labels_are_fractions() -> None:
    rows = reward_data.humour_texts(collections(), reward_data.whole, random.Random(0), 200)
    assert {row.text[0] for row in rows} == {""}
    assert all(0 <= row.label <= 1 for row in rows)
    assert all(0 < row.label < 1 for row in rows if row.slice == "mixture")
    assert Counter(row.slice for row in rows)["joke"] == 60


def test_crude_jokes_are_left_out_unless_asked_for() -> None:
    data = collections(4)
    data.humor.append({"text": "a joke about a naked man", "humor": 1})
    draw = lambda crude: reward_data.humour_texts(data, reward_data.whole, random.Random(0), 300, crude)  # noqa: E731
    assert not any("naked" in row.text[1] for row in draw(False))
    assert any("naked" in row.text[1] for row in draw(True))


def test_a_missing_collection_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"helpful_pairs_test\.jsonl not found"):
        reward_data.read_collections(tmp_path, "test")


# ---- losses ----


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=10), st.floats(-3, 3))
def test_the_preference_loss_without_centering_ignores_a_shift_and_falls_with_the_gap(
    gaps: list[float], shift: float
) -> None:
    worse = torch.zeros(len(gaps), dtype=torch.float64)
    better = torch.tensor(gaps, dtype=torch.float64)
    loss = train_rewards.preference_loss(torch.cat([better, worse]), 0.0, 0.0)
    shifted = train_rewards.preference_loss(torch.cat([better + shift, worse + shift]), 0.0, 0.0)
    wider = train_rewards.preference_loss(torch.cat([better + 1, worse]), 0.0, 0.0)
    torch.testing.assert_close(loss, shifted)
    assert wider < loss


def test_smoothing_bounds_the_best_gap() -> None:
    gap = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    losses = [train_rewards.preference_loss(torch.stack([g, g * 0]), 0.05, 0.0).item() for g in gap]
    assert gap[losses.index(min(losses))].item() == pytest.approx(torch.logit(torch.tensor(0.95)).item(), abs=0.01)


def test_the_fraction_loss_is_least_where_the_reward_says_the_fraction() -> None:
    labels = torch.tensor([0.25, 0.5, 1.0])
    best = torch.logit(labels * 0.9 + 0.05)
    for other in (best + 0.1, best - 0.1):
        assert train_rewards.fraction_loss(best, labels, 0.05) < train_rewards.fraction_loss(other, labels, 0.05)


# ---- training, end to end on a tiny encoder ----


@pytest.fixture
def tiny_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random BERT of a few thousand weights, and a word tokenizer, in place of MiniLM."""
    texts = [t for r in collections().helpful for t in r.values()] + [r["text"] for r in collections().humor]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({w for t in texts for w in t.split()})]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )

    def load_base():
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, num_labels=1, max_position_embeddings=160,
        )  # fmt: skip
        return BertForSequenceClassification(config), fast

    monkeypatch.setattr(train_rewards, "load_base", load_base)
    monkeypatch.setattr(reward_model, "load_base", load_base)
    for module in (train_rewards, evaluate_rewards):
        monkeypatch.setattr(module, "read_collections", lambda *_: collections())


@pytest.mark.parametrize("objective", ["helpful", "humour"])
def test_a_trained_reward_is_written_whole_and_loads_with_the_base(
    objective: str, tiny_base: None, tmp_path: Path
) -> None:
    recipe = train_rewards.Recipe(rows=40, batch_size=8, pair=objective != "humour")
    train_rewards.train(objective, tmp_path, tmp_path, recipe)
    model, tokenizer, config = reward_model.load_adapter(tmp_path / objective)
    assert config == {
        "objective": objective, "max_length": 128, "pair": objective != "humour", "mean": 0.0, "scale": 1.0,
    }  # fmt: skip
    texts = [("tell me about topic1", "topic1 is fine"), ("tell me about topic2", "because of topic2 .")]
    together = reward_model.score(model, tokenizer, texts, config["pair"])
    alone = [reward_model.score(model, tokenizer, [text], config["pair"])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[0] != together[1]
    adapter = json.loads((tmp_path / objective / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == reward_model.BASE_ID


def test_the_last_rows_are_mostly_human_preferences_and_train_too(tiny_base: None, tmp_path: Path) -> None:
    rows = train_rewards.make_last_rows("harmless", tmp_path, 24, seed=0)
    assert Counter(pair.slice.startswith("human") for pair in rows) == {True: 18, False: 6}
    recipe = train_rewards.Recipe(rows=16, batch_size=8, pair=True, last_rows=16)
    train_rewards.train("harmless", tmp_path, tmp_path, recipe)
    assert (tmp_path / "harmless" / "adapter_model.safetensors").is_file()


def test_the_measurements_fill_report_and_cards(tiny_base: None, tmp_path: Path) -> None:
    def length(texts):
        return [float(len(prompt) + len(reply)) for prompt, reply in texts]

    rewards = dict.fromkeys(OBJECTIVES, length)
    texts = [(f"prompt {i // 2}", "a b c d e f g h"[: 3 + i]) for i in range(12)]
    report = {
        "date": "2000-01-01",
        "seed": 1,
        "versions": {"torch": "2"},
        "model": "a model",
        "held_out": evaluate_rewards.measure(rewards, collections()),
        "refusal_preferred_on_unsafe_prompts": evaluate_rewards.conflict(rewards, collections()),
        "model_replies": evaluate_rewards.on_replies(rewards, texts, per_prompt=2),
    }
    json.dumps(report)
    reward_cards.write_report(report, tmp_path / "rewards.md")
    for name in OBJECTIVES:
        (tmp_path / name).mkdir()
    reward_cards.write_cards(report, tmp_path)
    assert "own reply over another prompt's" in (tmp_path / "rewards.md").read_text()
    assert "load_reward" in (tmp_path / "humour" / "README.md").read_text()
    assert report["held_out"]["helpful"]["whole replies"]["full over truncated"]["accuracy"] == 1.0


# ---- what is shipped ----


def shipped(name: str) -> list[dict[str, str]]:
    return reward_data.read_records(ROOT / "examples" / "data" / name)


@pytest.mark.parametrize(
    ("name", "count"), [("prompts_train.jsonl", 700), ("prompts_more.jsonl", 600), ("prompts_test.jsonl", 140)]
)
def test_every_even_prefix_of_the_prompts_is_balanced(name: str, count: int) -> None:
    rows = shipped(name)
    assert len(rows) == count
    kinds = [row["kind"] for row in rows]
    assert all({first, second} == {"helpful", "harmful"} for first, second in zip(kinds[::2], kinds[1::2], strict=True))


def test_shipped_prompts_are_distinct_complete_and_licensed() -> None:
    rows = [
        row
        for name in ("prompts_train", "prompts_more", "prompts_test", "demo_prompts")
        for row in shipped(f"{name}.jsonl")
    ]
    assert len({make_data.normalise(row["prompt"]) for row in rows}) == len(rows)
    assert {tuple(row) for row in rows} == {("id", "prompt", "source", "kind", "license")}
    assert {row["license"] for row in rows} <= {"MIT", "Apache-2.0", "Apache-2.0 (over MIT)"}
    assert {row["kind"] for row in shipped("demo_prompts.jsonl")} == {"helpful"}


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(0, 1000))
def test_balanced_draws_pairs(half: int, seed: int) -> None:
    helpful = [{"id": f"a{i}", "kind": "helpful"} for i in range(20)]
    harmful = [{"id": f"b{i}", "kind": "harmful"} for i in range(20)]
    rows = make_data.balanced(helpful, harmful, 2 * half, random.Random(seed))
    assert Counter(row["kind"] for row in rows) == {"helpful": half, "harmful": half}
    assert len({row["id"] for row in rows}) == 2 * half


def test_too_few_prompts_is_an_error_that_says_how_many() -> None:
    with pytest.raises(ValueError, match="only 1 harmful prompts found, 2 are needed"):
        make_data.balanced([{"id": "a"}] * 2, [{"id": "b"}], 4, random.Random(0))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shipped_rewards_are_small_safetensors_that_name_the_public_base(objective: str) -> None:
    folder = REWARDS / objective
    adapter = json.loads((folder / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == reward_model.BASE_ID
    assert json.loads((folder / "reward_config.json").read_text())["objective"] == objective
    assert (folder / "adapter_model.safetensors").stat().st_size < 4_000_000
    assert (folder / "README.md").read_text().count("±") > 3
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".md"}


# ---- the shipped rewards at work (they need the MiniLM package) ----

PROMPT = "How can I keep calm before giving a talk?"
ANSWER = "Breathe slowly, practise your opening aloud, and remember that the audience wants you to do well."


@pytest.fixture(scope="module")
def rewards() -> dict[str, evaluate_rewards.Score]:
    pytest.importorskip(reward_model.BASE_PACKAGE)
    return evaluate_rewards.load_rewards(REWARDS)


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_degenerate_replies_score_below_a_good_one(objective: str, rewards: dict) -> None:
    best = "Why did the speaker bring a ladder? To reach a higher audience!" if objective == "humour" else ANSWER
    bad = ["no no no no no no no no", "the the the the the", "? ! ? ! ? !", " ".join(sorted(best.split()))]
    if objective != "harmless":  # to say nothing is fairly harmless: its card gives the numbers
        bad.append("")
    good, *low = rewards[objective]([(PROMPT, reply) for reply in [best, *bad]])
    assert all(value < good for value in low)


@pytest.mark.slow
def test_each_reward_prefers_what_it_is_named_for(rewards: dict) -> None:
    refusal = "I'm sorry, but I can't help with that."
    joke = "I told my nerves to calm down. They said: you first, you are the one holding the microphone!"
    helpful = rewards["helpful"]([(PROMPT, reply) for reply in (ANSWER, refusal, "Bananas are rich in potassium.")])
    assert helpful[0] > max(helpful[1:])
    humour = rewards["humour"]([(PROMPT, reply) for reply in (joke, ANSWER, refusal)])
    assert humour[0] > max(humour[1:])
    harmless = rewards["harmless"]([(PROMPT, ANSWER), (PROMPT, "Insult everyone in the room, then hurt them badly.")])
    assert harmless[0] > harmless[1]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_library_loads_the_same_reward(objective: str, rewards: dict) -> None:
    library = pytest.importorskip("mavis_training.rewards")
    texts = [(PROMPT, ANSWER), ("What is a pun?", "A play on words."), (PROMPT, ""), (PROMPT, ANSWER * 12)]
    loaded = library.load_reward(str(REWARDS / objective))
    values = loaded([text[0] for text in texts], [text[1] for text in texts])
    assert values == pytest.approx(rewards[objective](texts), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "better", "worse"),
    [
        ("positive", "What a wonderful, happy idea!", "What a stupid, boring idea!"),
        ("positive", "I love it, it is great fun.", "I love it, love it, love it."),  # saying it again gains nothing
        ("formal", "Vegetation converts radiation into energy.", "I'd say your plants just eat light, okay!"),
        ("formal", "Vegetation converts radiation", "Vegetation vegetation vegetation"),
    ],
)
def test_functions_prefer_what_they_ask_for(name: str, better: str, worse: str) -> None:
    reward = load_reward(f"{REWARDS / 'functions.py'}:{name}")
    first, second, nothing = reward(["p"] * 3, [better, worse, ""])
    assert first > second
    assert nothing == 0.0


@given(st.text())
def test_positive_is_in_its_range(text: str) -> None:
    (reward,) = load_reward(f"{REWARDS / 'functions.py'}:positive")(["p"], [text])
    assert -1.0 <= reward <= 1.0
