"""The decoding benchmark: its baselines define one distribution, its rooflines are counted right, its table is true."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import cases
import decode
import fill_readme
import measuring
import pages
from mavis_logits import MavisLogitsProcessor
from mavis_logits.testing import recompute_values
from measuring import PLAIN, Measured, Setting, Timing
from report import Report
from roofline import Ceilings, Cost, adapters_cost, forward_cost, head_cost, logits_cost
from row import Row, key, make_row
from schemes import RecomputedQueries, RecomputedRows, RepeatedCache, Scheme, SlowTwin
from setups import LINEAR_LAYERS, Setup, llama_shapes, names
from tiny import PAD, VOCABULARY, make_base, make_head, make_value_model
from variants import VARIANTS, mean_candidates, roofline

SCHEMES = [SlowTwin, RepeatedCache, RecomputedRows, RecomputedQueries]


@pytest.fixture(scope="module")
def setup() -> Setup:
    return llama_shapes("cpu", dry_run=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", SCHEMES)
def test_every_scheme_gives_the_processors_distribution_step_by_step(kind: type[Scheme], architecture: str) -> None:
    models = {name: make_value_model(name, architecture=architecture, seed=seed) for seed, name in enumerate("ab")}
    steering: dict[str, Any] = {"weights": {"a": 0.3, "b": 0.7}, "beta": 4.0, "top_k": 5, "pad_token_id": PAD}
    scheme, fast = kind(models, **steering), MavisLogitsProcessor(models, **steering)
    random = torch.Generator().manual_seed(0)
    ids = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10]])
    for _ in range(4):
        scores = torch.randn(2, VOCABULARY, generator=random)
        tilted = fast(ids, scores).softmax(-1)
        torch.testing.assert_close(scheme(ids, scores).softmax(-1), tilted, atol=1e-4, rtol=0)
        ids = torch.cat([ids, torch.multinomial(tilted, 1, generator=random)], dim=1)


@pytest.mark.parametrize("kind", SCHEMES)
def test_every_scheme_gives_the_values_of_recomputing(kind: type[Scheme]) -> None:
    model = make_value_model("a")
    scheme = kind({"a": model}, {"a": 1.0}, beta=4.0, top_k=3, pad_token_id=PAD)
    for ids in (torch.tensor([[PAD, 5, 6], [7, 8, 9]]), torch.tensor([[4, 3, 5, 9]])):  # other prompts, other rows
        scheme.reset()
        for _ in range(2):
            candidates = torch.arange(20, 23).repeat(len(ids), 1)
            real = ids != PAD
            values = scheme.values("a", ids, real, candidates)
            scheme.candidates = candidates
            for row, own in enumerate(values):
                expected = recompute_values(model, ids[row, real[row]].numpy(), candidates[row])
                torch.testing.assert_close(own, expected, atol=1e-4, rtol=0)
            ids = torch.cat([ids, candidates[:, 1:2]], dim=1)


def test_operations_are_those_that_a_decoder_does() -> None:
    base = make_base()
    base.set_attn_implementation("eager")
    rows, past = 2, 6
    cache = DynamicCache(config=base.config)
    base(torch.full((rows, past), 5), past_key_values=cache)
    with FlopCounterMode(display=False) as counter:
        base(torch.full((rows, 1), 5), past_key_values=cache)
    layers, logits = forward_cost(base.config, base.dtype, rows, 1, past), logits_cost(base.config, base.dtype, rows)
    # before transformers 5.17 or so the angles of rotary positions were a matrix product, of a ten-thousandth
    assert counter.get_total_flops() == pytest.approx(layers.flops + logits.flops, rel=1e-3)


def test_bytes_are_the_weights_and_the_cache() -> None:
    base = make_base()
    cache = DynamicCache(config=base.config)
    base(torch.full((2, 6), 5), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    matrices = sum(module.weight.nbytes for module in base.model.modules() if isinstance(module, torch.nn.Linear))
    assert forward_cost(base.config, base.dtype, 2, 1, 6).bytes == matrices + held
    assert logits_cost(base.config, base.dtype, 2).bytes == base.lm_head.weight.nbytes
    assert forward_cost(base.config, torch.bfloat16, 2, 1, 6).bytes == (matrices + held) / 2


def test_candidates_see_the_cache_and_themselves() -> None:
    config = make_base().config
    alone, four = (forward_cost(config, torch.float32, 1, q, 6, causal=False) for q in (1, 4))
    assert four.flops == 4 * alone.flops
    assert four.bytes == alone.bytes
    assert forward_cost(config, torch.float32, 1, 4, 6).flops > four.flops


def test_adapters_are_counted(setup: Setup) -> None:
    model = setup.adapters(1, torch.float32)[names(1)[0]]
    tokens = 5
    sizes = {name: p.shape for name, p in model.backbone.named_parameters() if ".lora_" in name}
    assert len(sizes) == 2 * len(LINEAR_LAYERS) * model.backbone.config.num_hidden_layers
    weights = sum(shape.numel() for shape in sizes.values())
    cost = adapters_cost(setup.value_config, torch.float32, setup.rank, 3, tokens)
    assert (cost.bytes, cost.flops) == (3 * weights * 4, 2 * weights * tokens)


def test_a_head_does_little_more_than_is_counted() -> None:
    base = make_base()
    head = make_head(base, "a", "b")
    hidden, candidates = torch.randn(3, 32), torch.arange(15).repeat(3, 1)
    head(hidden, candidates)  # makes the table
    with FlopCounterMode(display=False) as counter:
        head(hidden, candidates)
    outputs = 2 * 3 * 15 * head.config.width * 2
    assert counter.get_total_flops() == head_cost(32, head.config.width, 3, 15).flops + outputs


def test_the_roofline_is_the_longer_of_both_times() -> None:
    ceilings = Ceilings("cpu", buffer=1 << 20, shortest=0.0)
    assert ceilings.bandwidth() > 0
    assert ceilings.throughput(2, (8, 16), torch.float32) > 0
    ceilings.bandwidth = lambda: 100.0
    ceilings.throughput = lambda *_: 10.0
    assert ceilings.seconds(Cost(200, 10, 1, (8, 16), torch.float32)) == 2.0
    assert ceilings.seconds(Cost(200, 50, 1, (8, 16), torch.float32)) == 5.0


def test_rooflines_grow_with_the_work(setup: Setup) -> None:
    ceilings = Ceilings("cpu")
    ceilings.bandwidth = lambda: 1e9
    ceilings.throughput = lambda *_: 1e9
    setting = Setting("main", batch=2, top_k=5, value_dtype="bfloat16")

    def least(name: str, candidates: float = 5, **changes: Any) -> float:
        return roofline(setup, replace(setting, **changes), name, candidates, ceilings)

    plain, one, separate = (
        least(name) for name in (PLAIN, "one value model, strategy", "separate value models, strategy")
    )
    assert separate - plain == pytest.approx(2 * (one - plain))
    assert plain < least("value head, strategy") < least("value head, strategy", 100)
    assert one < least("fused adapters, strategy") < least("fused adapters, strategy", objectives=3)
    assert least("repeated cache") == separate
    assert least(PLAIN, context=128) > plain
    assert least("one value model, strategy", 2.5) < one < least("one value model, strategy", 10)


def test_candidates_are_those_set_or_a_mean(setup: Setup) -> None:
    setting = Setting("main", batch=2, context=6, new_tokens=4, top_k=5, value_dtype="bfloat16")
    counts = {name: mean_candidates(setup, setting, name) for name in (PLAIN, *VARIANTS)}
    assert counts[PLAIN] == 0
    assert counts["repeated cache"] == counts["value head, strategy"] == 5
    assert counts["value head, k 200, processor"] == 200
    assert counts["value head, whole vocabulary, strategy"] == setup.model.config.vocab_size
    assert 1 <= counts["one value model, strategy, min-p 0.1"] <= counts["one value model, strategy, min-p 0.05"] <= 5
    with torch.no_grad():  # a distribution with one mode keeps one candidate
        setup.model.lm_head.weight.mul_(1e4)
    try:
        assert 1 <= mean_candidates(setup, setting, "fused adapters, strategy, min-p 0.1") < 2
    finally:
        setup.model.lm_head.weight.data.div_(1e4)


def test_prompts_have_the_lengths_asked_for(setup: Setup) -> None:
    same = setup.prompts(1, 3, 16, different=False)
    assert same["input_ids"].shape == (3, 16)
    assert same["attention_mask"].all()
    assert len(torch.unique(torch.cat([same["input_ids"], setup.prompts(2, 3, 16, False)["input_ids"]]), dim=0)) == 6
    mask = setup.prompts(1, 3, 16, different=True)["attention_mask"]
    assert mask.sum(dim=1).tolist() == [16, 10, 4]
    assert mask[:, -1].all()
    assert Setting("lengths", context=16, new_tokens=8, different_lengths=True).middle == 10 + 4


def test_every_run_is_compared_with_the_plain_runs_around_it(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = []

    def scripted(_: Any, __: Any, ___: Any, arguments: dict[str, Any], tokens: int, seed: int) -> Timing:
        turns.append((arguments.get("name", PLAIN), tokens, seed))
        seconds = {(1, PLAIN): 1.0, (2, PLAIN): 4.0, (1, "x"): 2.0, (2, "x"): 2.0, (1, "slow"): 10.0}
        second = arguments == {} and [turn[0] for turn in turns if turn[2] == seed].count(PLAIN) == 2
        time = seconds.get((seed, turns[-1][0]), 1.0) * (3 if second else 1)
        return Timing(time, time / 2, 100 if seed == 0 else 50)

    monkeypatch.setattr(measuring, "decode", scripted)
    variants = {"x": {"name": "x"}, "slow": {"name": "slow"}}
    measured = measuring.measure(setup, Setting("main", new_tokens=8), variants, {"x": 2, "slow": 1})
    assert [turn[0] for turn in turns if turn[2] == 1] == [PLAIN, "x", PLAIN, "slow", PLAIN]
    assert [turn[0] for turn in turns if turn[2] == 2] == [PLAIN, "x", PLAIN]
    assert {turn[1] for turn in turns if turn[2] == 0} == {4}  # a short warm-up
    assert measured["x"].ratios == [2 / 2, 2 / 8]
    assert measured["x"].token_ratios == [1.0, 0.25]
    assert measured["slow"].ratios == [5.0]
    assert measured[PLAIN].ratios == [3, 1 / 3, 3]  # each beside the one before
    assert measured["x"].memory == 100


def test_generation_is_timed(setup: Setup) -> None:
    setting = Setting("main", batch=2, context=6, new_tokens=4)
    inputs = setup.prompts(1, 2, 6, different=False)
    timing = measuring.decode(setup, setting, inputs, {}, 4, seed=0)
    assert 0 < 3 * timing.token_seconds < timing.seconds

    def ignores_criteria(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return input_ids

    with pytest.raises(ValueError, match="never asked"):
        measuring.decode(setup, setting, inputs, {"custom_generate": ignores_criteria}, 4, seed=0)


def test_peak_memory_counts_what_was_freed_again() -> None:
    # What malloc gives may be pages that it had kept.
    with measuring.peak_memory(torch.device("cpu")) as peak, mmap.mmap(-1, 1 << 26) as block:
        block[:: mmap.PAGESIZE] = bytes(len(range(0, len(block), mmap.PAGESIZE)))
    if not peak:
        pytest.skip("this system does not tell a process's peak memory")
    assert (1 << 26) * 0.9 < peak[0] < (1 << 26) * 2


def row(variant: str = "one value model, strategy", median: float = 1.5, **changes: Any) -> Row:
    timings = [Timing(median * plain, plain / 10, 1 << 20) for plain in (1.0, 2.0, 3.0)]
    measured = Measured(timings, [Timing(plain, plain / 12, None) for plain in (1.0, 2.0, 3.0)])
    setting = Setting("main", batch=2, new_tokens=6)
    return replace(make_row("cpu", variant, setting, measured, 15, 0.2, 0.1), **changes)


def test_a_row_sums_up_its_rounds() -> None:
    own = row()
    assert (own.median, own.low, own.high, own.rounds) == (1.5, 1.5, 1.5, 3)
    assert own.token_ratio == pytest.approx(1.2)
    assert own.tokens_per_second == 2 * 6 / 3.0
    assert own.roofline_ratio == 2.0
    assert own.over_roofline == pytest.approx(0.6)
    assert own.key == key("cpu", own.variant, Setting("main", batch=2, new_tokens=6))


ENVIRONMENT = {
    "machine": "a computer", "versions": {"torch": "2"}, "model": "a model", "dtype": "float32",
    "ceilings": {"bandwidth": 1e9, "flops": {"float32": 1e9}},
}  # fmt: skip


def test_results_of_several_runs_come_together(tmp_path: Path) -> None:
    (tmp_path / "decode.json").write_text(json.dumps({"results": [{"variant": "of an older form"}]}))
    first = Report(tmp_path)
    assert not first.rows
    first.enter("cpu", ENVIRONMENT, again=False)
    first.add([row(), row(PLAIN, 1.0)])
    first.save()
    second = Report(tmp_path)
    second.enter("cpu", ENVIRONMENT | {"ceilings": {"bandwidth": 2e9, "flops": {}}}, again=False)
    second.add([row(median=1.25), row("recomputed token, k rows", 2.5)])
    assert [(one.variant, one.median) for one in second.sorted()] == [
        (PLAIN, 1.0),
        ("one value model, strategy", 1.25),
        ("recomputed token, k rows", 2.5),
    ]
    with pytest.raises(ValueError, match="another machine"):
        second.enter("cpu", ENVIRONMENT | {"machine": "another"}, again=False)
    second.enter("cuda", ENVIRONMENT | {"machine": "a GPU"}, again=False)
    second.enter("cpu", ENVIRONMENT | {"machine": "another"}, again=True)
    assert not second.rows


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    report = Report(tmp_path)
    report.enter("cpu", ENVIRONMENT, again=False)
    adaptive = row("one value model, strategy, min-p 0.1", 1.2, candidates=5.94, memory=None)
    report.add([row(), row(PLAIN, 1.0), row("recomputed token, k rows", 4.5), adaptive, row(batch=8)])
    report.publish()
    page = (tmp_path / "decode.md").read_text()
    assert "| 2 | one value model, strategy | 15 | 1.50 (1.50 to 1.50) | 1.20 | 2.00 | 0.60 | 4.0 | 1 | 3.00 |" in page
    assert "min-p 0.1 | 5.94 | 1.20 (1.20 to 1.20) | 1.20 | 2.00 | 0.60 | 5.0 | – | 3.75 |" in page
    assert "| 8 | one value model, strategy | 15 | 1.50 (1.50 to 1.50) | 1.20 | 2.00 | 0.60 | 4.0 | 1 | – |" in page
    assert "K 15, objectives 2, prompt tokens 64, new tokens 6" in page
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "| one value model, strategy | 1.50 (1.50 to 1.50) |" in fill_readme.decode(tmp_path)


def test_what_is_not_compared_has_no_plot(tmp_path: Path) -> None:
    pages.plot([row(PLAIN, 1.0), row(section="head")], tmp_path / "decode.png")
    assert not (tmp_path / "decode.png").exists()


def test_every_case_can_be_run_and_every_variant_and_section_is_measured() -> None:
    for made in (cases.cpu_cases(), cases.gpu_cases()):
        assert {case.setting.section for case in made} <= cases.SECTIONS.keys()
        for case in made:
            assert len(set(case.variants)) == len(case.variants)
            assert case.rounds >= 1
        assert {name for case in made for name in case.variants} == VARIANTS.keys()
        settings = [case.setting for case in made]
        assert len(set(settings)) == len(settings)
    assert {case.setting.batch for case in cases.cpu_cases()} == {1, 8, 32}
    every = {case.setting.section for case in [*cases.cpu_cases(), *cases.gpu_cases()]}
    assert every == cases.SECTIONS.keys()


def options(*given: str) -> Any:
    return decode.parser().parse_args(given)


def test_options_select_cases() -> None:
    assert {case.setting.section for case in decode.selected(options())} == {"main"}
    chosen = decode.selected(
        options("--suite", "head", "dtype", "--batches", "32", "--variants", "^value head,", "--rounds", "2")
    )
    assert [(case.setting.section, case.setting.batch, case.rounds) for case in chosen] == [("head", 32, 2)]
    assert all(name.startswith("value head,") for name in chosen[0].variants)
    assert {case.setting.new_tokens for case in decode.selected(options("--new-tokens", "5"))} == {5}
    assert {case.setting.value_dtype for case in decode.selected(options("--device", "cuda"))} == {"bfloat16"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_dry_run_does_everything_once(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--dry-run", "--device", device, "--out", str(tmp_path)]
    suite = ["--suite", "full" if device == "cuda" else "dtype"]
    assert decode.main([*arguments, *suite]) == 0
    content = json.loads((tmp_path / "decode.json").read_text())
    measured = {(one["section"], one["variant"]) for one in content["results"]}
    wanted = {(c.setting.section, name) for c in decode.selected(options(*arguments, *suite)) for name in c.variants}
    assert wanted <= measured
    assert content["settings"]["model"].startswith("tiny random models")
    assert all(one["median"] > 0 and one["device"] == device for one in content["results"])
    assert "Time of steered decoding" in capsys.readouterr().out

    # What is known is not measured again.
    monkeypatch.setattr(decode, "measure", lambda *_: pytest.fail("measured again"))
    assert decode.main([*arguments, *suite]) == 0
    assert json.loads((tmp_path / "decode.json").read_text())["results"] == content["results"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decode.main(["--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err
