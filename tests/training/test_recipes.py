"""The recipes of the paper against its tables, typed from it here."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import yaml

from mavis_training.base.formats import SUMMARIZE, Limits
from mavis_training.cli import read_config
from mavis_training.distil import DistilConfig
from mavis_training.evaluate import EvaluateConfig
from mavis_training.iterate import IterateConfig
from mavis_training.make_prompts import PromptsConfig
from mavis_training.rewards.classifier import ClassifierSettings
from mavis_training.rewards.load import split_spec
from mavis_training.sft import SftConfig
from mavis_training.train_model import LoraSettings

PAPER = Path(__file__).parents[2] / "training" / "recipes" / "paper"
HH, SUMMARIES = ("helpfulness", "harmlessness", "humor"), ("summarization", "faithfulness")
# Table 7: trees to train on and to validate with, and table 8: zeta and beta, for each iteration.
ITERATIONS = {
    ("helpfulness", "7b"): [
        (3377, 300, None, 5.0), (1100, 100, 0.03, 5.0), (3800, 200, 0.03, 5.0), (1900, 100, 0.04, 7.0)
    ],
    ("harmlessness", "7b"): [(3377, 300, None, 5.0), (1087, 111, 0.05, 5.0), (1770, 199, 0.05, 5.5)],
    ("humor", "7b"): [(3377, 300, None, 5.0), (1089, 111, 0.005, 3.5)],
    ("summarization", "7b"): [(2800, 200, None, 2.7)],
    ("faithfulness", "7b"): [(2800, 200, None, 1.5)],
    ("summarization", "13b"): [(2800, 200, None, 5.0), (1900, 100, 0.02, 5.0)],
    ("faithfulness", "13b"): [(2800, 200, None, 5.0), (950, 50, 0.01, 6.0)],
}  # fmt: skip
# Table 9: beta at lambda_1 = 0.2, 0.4, 0.6, 0.8.
PARETO = {
    ("helpfulness", "harmlessness", "7b"): [5.5, 7.0, 7.0, 7.0],
    ("helpfulness", "humor", "7b"): [3.5, 3.5, 5.0, 6.0],
    ("harmlessness", "humor", "7b"): [3.5, 4.0, 4.5, 5.0],
    ("summarization", "faithfulness", "7b"): [2.7, 2.7, 2.7, 2.7],
    ("summarization", "faithfulness", "13b"): [6.0, 6.0, 5.0, 5.0],
}
# Table 10.
REWARDS = {
    "helpfulness": "Ray2333/gpt2-large-helpful-reward_model",
    "harmlessness": "Ray2333/gpt2-large-harmless-reward_model",
    "humor": "mohameddhiab/humor-no-humor",
    "summarization": "Tristan/gpt2_reward_summarization",
    "faithfulness": "CogComp/bart-faithful-summary-detector",
}


@cache
def read(kind, name):
    command = Path(name).stem.split("-")[0]
    return read_config(kind, ["--config", str(PAPER / f"{name}.yaml")], command)


def data_of(objective):
    return "hh" if objective in HH else "summarize"


def test_there_is_a_recipe_for_every_row_of_the_tables_and_no_other():
    expected = {f"{data_of(o)}/iterate-{size}-{o}" for o, size in ITERATIONS}
    expected |= {f"{data_of(a)}/evaluate-{size}-{a}-{b}" for a, b, size in PARETO}
    found = {str(path.relative_to(PAPER).with_suffix("")) for path in PAPER.rglob("*.yaml")}
    assert {name for name in found if "iterate-" in name or "evaluate-" in name} == expected


@pytest.mark.parametrize(("objective", "size"), ITERATIONS)
def test_iterations(objective, size):
    config = read(IterateConfig, f"{data_of(objective)}/iterate-{size}-{objective}")
    rows, hh, seen = ITERATIONS[objective, size], objective in HH, 0
    assert len(config.iterations) == len(rows)
    assert config.objectives == [objective]
    assert not config.early_stop
    assert config.model == f"runs/paper/{data_of(objective)}/sft-{size}"
    assert config.validation.max_new_tokens == (128 if hh else 48)
    for i, (training, validation, zeta, beta) in enumerate(rows):
        assert config.beta_of(i) == beta
        assert config.zeta_of(i) == (zeta or 0.0)
        policy = config.policy_settings(i, beta)
        assert (policy["top_k"], policy["normalize"]) == (15 if size == "7b" else 30, "minmax")

        trees = config.collect_config(i, "store", None)
        if config.iterations[i].trees is None:
            assert trees.limit == training + validation
            assert config.iterations[i].skip_prompts == seen
            later = i > 0 and (objective, size) != ("faithfulness", "13b")  # section F.4
            assert (trees.layers, trees.root_children, trees.children) == ((4, 2, 3) if later else (5, 4, 2))
            assert trees.max_new_tokens == (128 if hh else 48)
            assert trees.temperature == 1.0
        seen += training + validation

        train = config.train_config(i, ["store"], None, "output", "initial", config.zeta_of(i))
        first_hh = hh and i == 0  # section F.4
        assert train.learning_rate == (2e-5 if first_hh else 4e-5)
        assert train.batch_size * train.gradient_accumulation == (16 if first_hh else 32)
        assert train.warmup_steps == (100 if i == 0 else 0)
        assert train.epochs == (2 if i == 1 and objective in ("helpfulness", "harmlessness") else 1)
        assert train.lora == LoraSettings(rank=128, alpha=256, dropout=0.2)
        assert (train.optimizer, train.weight_decay, train.drop_leaves) == ("adafactor", 0.002, 0.5)
        assert (train.targets, train.packing) == ("nodes", "nodes")
        assert train.backbone == "TinyLlama/TinyLlama_v1.1"
        assert round(train.validation_share * (training + validation)) == validation


def test_trees_of_iteration_0_are_shared():
    for objective, size in ITERATIONS:
        config = read(IterateConfig, f"{data_of(objective)}/iterate-{size}-{objective}")
        lead = HH[0] if objective in HH else SUMMARIES[0]
        owner = read(IterateConfig, f"{data_of(objective)}/iterate-{size}-{lead}")
        shared = None if objective == lead else f"{owner.output}/iteration-0/trees"
        assert config.iterations[0].trees == shared
        assert (config.model, config.prompts) == (owner.model, owner.prompts)


@pytest.mark.parametrize(("first", "second", "size"), PARETO)
def test_pareto_fronts(first, second, size):
    config = read(EvaluateConfig, f"{data_of(first)}/evaluate-{size}-{first}-{second}")
    ends = [ITERATIONS[objective, size][-1][3] for objective in (second, first)]
    betas = dict(zip((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), [ends[0], *PARETO[first, second, size], ends[1]], strict=True))
    assert config.settings["unsteered"] == {}
    assert len(config.settings) == 2 * len(betas) + 1
    for share, beta in betas.items():
        for setting in (config.settings[f"lambda {share}"], config.settings[f"lambda {share}, 5 beams"]):
            assert setting["beta"] == beta
            assert setting["top_k"] == (15 if size == "7b" else 30)
            assert setting["weights"] == pytest.approx({first: share, second: 1 - share})
        assert config.settings[f"lambda {share}, 5 beams"]["num_beams"] == 5
    for objective, value in config.value_functions.items():
        assert (
            value
            == f"runs/paper/{data_of(first)}/{size}-{objective}/iteration-{len(ITERATIONS[objective, size]) - 1}/value"
        )
    assert config.max_new_tokens == (128 if first in HH else 48)


def test_reward_models():
    read_of = {}
    names = [(IterateConfig, f"{data_of(o)}/iterate-{size}-{o}") for o, size in ITERATIONS]
    names += [(EvaluateConfig, f"{data_of(a)}/evaluate-{size}-{a}-{b}") for a, b, size in PARETO]
    for kind, name in names:
        for objective, spec in read(kind, name).rewards.items():
            model, settings = split_spec(spec)
            assert model == REWARDS[objective]
            assert read_of.setdefault(objective, settings) == settings
    settings = {objective: ClassifierSettings(**given) for objective, given in read_of.items()}
    assert set(settings) == set(REWARDS)
    assert {objective: s.label for objective, s in settings.items() if s.label is not None} == {
        "humor": 1, "faithfulness": 1
    }  # fmt: skip
    assert settings["humor"].texts == ["{completion}"]
    assert settings["faithfulness"].texts == ["{completion}", "{post}"]
    assert settings["summarization"].texts == ["{completion} <|endoftext|> {post}"]
    assert all(s.output == "logit" for s in settings.values())


def test_prompts():
    for name in ("train", "test"):
        hh = read(PromptsConfig, f"hh/prompts-{name}")
        assert (hh.source, hh.format, hh.style) == ("Anthropic/hh-rlhf", "hh", "raw")
        assert hh.limits() == Limits(max_tokens=200)
        posts = read(PromptsConfig, f"summarize/prompts-{name}")
        assert (posts.source, posts.format) == ("openai/summarize_from_feedback", "summarize")
        assert posts.limits() == Limits(101, 1199, 8, 512)
        assert posts.template == SUMMARIZE
    sft = [read(PromptsConfig, f"hh/prompts-sft-{name}") for name in ("helpful", "harmless")]
    assert [config.limit for config in sft] == [5000, 5000]
    assert read(PromptsConfig, "summarize/prompts-sft").limit == 10000
    assert all(config.completions for config in sft)


@pytest.mark.parametrize("name", ["hh/sft-7b", "summarize/sft-7b", "summarize/sft-13b"])
def test_fine_tuning(name):
    """Table 4."""
    config = read(SftConfig, name)
    assert (config.learning_rate, config.batch_size, config.weight_decay) == (1.4e-4, 1, 0.01)
    assert config.gradient_accumulation == 1
    assert config.lora == LoraSettings(rank=64, alpha=128, dropout=0.05)
    assert config.epochs == 1
    assert config.stop_at_step == (3000 if name.endswith("13b") else None)
    assert config.model == f"meta-llama/Llama-2-{name.split('-')[1]}-hf"
    written = {read(PromptsConfig, f"hh/prompts-sft-{kind}").output for kind in ("helpful", "harmless")}
    assert set(config.data) == (written if name.startswith("hh") else {"runs/paper/summarize/prompts-sft.jsonl"})


def test_distillation_takes_the_last_value_models():
    config = read(DistilConfig, "hh/distil-7b")
    for objective in HH:
        last = len(ITERATIONS[objective, "7b"]) - 1
        assert config.teachers[objective] == f"runs/paper/hh/7b-{objective}/iteration-{last}/value"
    assert config.backbone == "TinyLlama/TinyLlama_v1.1"


@pytest.mark.parametrize(
    ("name", "epochs", "rate", "mini_batch", "target", "initial", "rank", "top_k"),
    [
        ("ppo-7b", 2, 7e-6, 1, 3.0, 0.1, 64, 15),  # table 5
        ("ppo-13b-summarization", 1, 1e-5, 16, 8.0, 0.05, 128, 30),  # table 6
        ("ppo-13b-faithfulness", 1, 1e-5, 16, 4.0, 0.05, 128, 30),
    ],
)
def test_settings_of_ppo(name, epochs, rate, mini_batch, target, initial, rank, top_k):
    assert yaml.safe_load((PAPER / "baselines" / f"{name}.yaml").read_text()) == {
        "epochs": epochs,
        "learning_rate": rate,
        "mini_batch_size": mini_batch,
        "batch_size": 64,
        "target": target,
        "init_kl_coef": initial,
        "max_grad_norm": 0.5,
        "lora": {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.05},
        "generation": {"top_k": top_k},
    }
