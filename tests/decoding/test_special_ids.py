"""Special ids that mean several things, and prompts that are no ids: read right, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from mavis_logits import MavisLogitsProcessor, MavisSampling, ValueHead
from mavis_logits.decoding.given import unreadable
from mavis_logits.scoring.rows import endings, guess_padding
from mavis_logits.testing import algorithm_2
from mavis_logits.values.special_tokens import special_tokens
from tiny import EOS, PAD, VOCABULARY, make_base, make_head, make_value_model

K, BETA, END = 6, 3.0, 96
ROWS = [[7, 11, 12, 13], [7, 14], [15, 7, 16]]  # 7 is the special id: it begins two texts and stands inside one


def padded(rows: list[list[int]], pad: int, width: int = 0) -> dict[str, Tensor]:
    width = max(width, *map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def base_with(**ids: Any) -> PreTrainedModel:
    base = make_base()
    for config in (base.config, base.generation_config):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, ids.get(name))
    return base


def value_model_with(**ids: Any) -> Any:
    model = make_value_model("a")
    for config in (model.config, model.backbone.config):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, ids.get(name))
    return model


class Steered(LogitsProcessor):
    """Keeps what a processor was given and gave."""

    def __init__(self, inner: MavisLogitsProcessor) -> None:
        self.inner, self.calls = inner, list[tuple[Tensor, Tensor, Tensor]]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = self.inner(input_ids, scores)
        self.calls.append((input_ids, scores, out))
        return out

    def hold(self, rows: list[list[int]]) -> None:
        """Against Algorithm 2 on the rows' texts, which `rows` begin, up to their ends."""
        model = self.inner.functions.models[0]
        assert self.calls
        for input_ids, scores, out in self.calls:
            width = self.calls[0][0].shape[1]
            for number, row in enumerate(rows):
                new = input_ids[number, width:].tolist()
                if END in new:
                    continue
                log_ref = torch.log_softmax(scores[number].double(), dim=-1)
                every = torch.arange(len(log_ref))
                texts = torch.cat([torch.tensor(row + new).expand(len(every), -1), every[:, None]], dim=1)
                with torch.no_grad():
                    values = model(texts).values[:, -1, 0]
                expected = algorithm_2(log_ref, lambda token: float(values[token]), K, BETA)  # noqa: B023
                torch.testing.assert_close(out[number].double().exp(), expected, atol=1e-4, rtol=1e-3)


def steer(value_model: Any, **settings: Any) -> Steered:
    return Steered(MavisLogitsProcessor(value_model, beta=BETA, top_k=K, **settings))


@pytest.mark.parametrize("ids", [
    {"pad_token_id": 7, "bos_token_id": 7, "eos_token_id": 7},
    {"pad_token_id": 7, "eos_token_id": [EOS, 7]},
    {"pad_token_id": 7},
    {"bos_token_id": 7, "eos_token_id": 7},
], ids=["bos = eos = pad", "two EOS, one is pad", "pad only", "no pad"])  # fmt: skip
@pytest.mark.parametrize("width", [0, 6])
def test_the_attention_mask_tells_padding_from_text(ids: dict[str, Any], width: int) -> None:
    base, model = base_with(**ids), value_model_with(**ids)
    for rows in (ROWS, ROWS[:1], [[7, 7, 20], [7, 7, 7, 21]]):
        mavis = steer(model, model=base)
        call = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 7, "eos_token_id": END}
        base.generate(**padded(rows, 7, width), **call, logits_processor=[mavis])
        mavis.hold(rows)
        # Another call goes by its own mask, also where its ids begin like those of the last.
        mavis.calls.clear()
        other = [[7] * (len(rows[0]) and 1) + row for row in rows]
        base.generate(**padded(other, 7, width + 1 if width else 0), **call, logits_processor=[mavis])
        mavis.hold(other)


def test_beams_drafts_and_later_turns_keep_their_padding() -> None:
    base, model = base_with(pad_token_id=7, eos_token_id=7), value_model_with(pad_token_id=7)
    call = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 7, "eos_token_id": END}
    mavis = steer(model, model=base)
    base.generate(**padded(ROWS, 7), **call, num_beams=2, logits_processor=[mavis])
    mavis.hold([row for row in ROWS for _ in range(2)])
    for more in ({"assistant_model": make_base(seed=5)}, {"prompt_lookup_num_tokens": 2}):
        mavis = steer(model, model=base)
        text = [7, 5, 6, 5, 6]
        out = base.generate(**padded([text], 7, 8), **call, **more, logits_processor=[mavis])
        plain = steer(model, model=base)
        assert torch.equal(out, base.generate(**padded([text], 7, 8), **call, logits_processor=[plain]))
        plain.hold([text])
        turn = text + out[0, 8:].tolist() + [30, 31]
        plain.calls.clear()
        base.generate(**padded([turn], 7), **call, logits_processor=[plain])
        plain.hold([turn])


def test_without_the_model_what_may_be_either_is_refused() -> None:
    ids = {"pad_token_id": 7, "eos_token_id": 7}
    base, model = base_with(**ids), value_model_with(**ids)
    call = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": END, "pad_token_id": 7}
    given = {"pad_token_id": 7, "eos_token_id": 7}
    with pytest.raises(ValueError, match=r"begins with token 7.*also begins or ends texts: pass model="):
        base.generate(**padded(ROWS[:2], 7), **call, logits_processor=[steer(model, **given)])
    mavis = steer(model, **given)  # a batch with a row that has none is padded to it
    base.generate(**padded([ROWS[2], ROWS[1][1:]], 7), **call, logits_processor=[mavis])
    mavis.hold([ROWS[2], ROWS[1][1:]])
    # A lone token is a prompt, and stays one.
    mavis = steer(model, **given)
    base.generate(torch.tensor([[7]]), **call, logits_processor=[mavis])
    mavis.hold([[7]])


def test_padding_is_never_made_up_of_eos() -> None:
    ids = {"eos_token_id": 7}
    base, model = base_with(**ids), value_model_with()
    assert special_tokens([model], base).pad is None
    call = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": END, "pad_token_id": 7}
    with pytest.raises(ValueError, match=r"begin with token 7, which may be padding or text, and no padding token"):
        base.generate(**padded([[11, 12, 13], [14]], 7), **call, logits_processor=[steer(model, eos_token_id=7)])
    for way_out in ({"model": base}, {"eos_token_id": 7, "pad_token_id": 7}, {"tokenizer": Words(pad=7, eos=7)}):
        mavis = steer(model, **way_out)
        base.generate(**padded([[11, 12, 13], [14]], 7), **call, logits_processor=[mavis])
        mavis.hold([[11, 12, 13], [14]])
    mavis = steer(model, eos_token_id=7)
    base.generate(torch.tensor([[7, 12, 13], [7, 14, 15]]), **call, logits_processor=[mavis])
    mavis.hold([[7, 12, 13], [7, 14, 15]])


class Words:
    """What is asked of a tokenizer."""

    name_or_path = "words"

    def __init__(self, pad: int | None = None, eos: int | None = None, bos: int | None = None, size: int = 97) -> None:
        self.pad_token_id, self.eos_token_id, self.bos_token_id, self.size = pad, eos, bos, size

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.size)}


def test_the_tokenizer_is_believed() -> None:
    base, model = base_with(pad_token_id=3, eos_token_id=[4, 5], bos_token_id=6), value_model_with(pad_token_id=8)
    assert special_tokens([model], base) == (3, {4, 5}, {4, 5, 6})
    tokenizer: Any = Words(pad=90, eos=91, bos=92)
    assert special_tokens([model], base, tokenizer) == (90, {91, 4, 5}, {91, 4, 5, 92})
    assert special_tokens([model], base, tokenizer, pad_token_id=1, eos_token_id=2) == (1, {2}, {2, 92})
    assert special_tokens([model], base, Words()).pad == 3  # type: ignore[arg-type]
    assert special_tokens([model]).pad == 8
    # A token added for padding, of which configurations do not know.
    mavis = steer(model, tokenizer=tokenizer)
    call = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": END, "pad_token_id": 90}
    base.generate(**padded([[11, 12, 13], [14]], 90), **call, logits_processor=[mavis])
    mavis.hold([[11, 12, 13], [14]])


def test_a_prompt_closes_nothing() -> None:
    base = base_with(pad_token_id=EOS, eos_token_id=EOS)
    rows = [[11, 12, EOS, EOS], [13, 14, 15, 16]]
    mavis = steer(value_model_with(), model=base)
    call = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": END, "pad_token_id": EOS}
    base.generate(**padded(rows, EOS), **call, logits_processor=[mavis])
    mavis.hold(rows)
    last = [row[-2:] for row in rows]
    assert endings(last, 4, frozenset({EOS}), EOS).closed == [True, False]
    assert not any(endings(last, 4, frozenset({EOS}), EOS, begun=4).closed)
    assert endings([[EOS, EOS], [1, 2]], 6, frozenset({EOS}), None, begun=4).closed == [True, False]


def test_guessed_padding() -> None:
    def guess(*rows: list[int], pad: int | None, borders: set[int]) -> list[int]:
        ids = torch.tensor(rows).numpy()
        return guess_padding(ids, pad, frozenset(borders)).tolist()  # type: ignore[no-any-return]

    assert guess([0, 0, 5], [0, 6, 7], pad=0, borders={1}) == [2, 1]
    assert guess([0, 0, 5], [8, 6, 7], pad=0, borders={0}) == [2, 0]
    assert guess([1, 6, 5], [1, 6, 7], pad=None, borders={1}) == [0, 0]
    assert guess([1], [0], pad=0, borders={0}) == [0, 0]
    for rows, pad in ((([1, 1, 5], [1, 6, 7]), None), (([0, 5], [0, 6]), 0)):
        with pytest.raises(ValueError, match="pass model="):
            guess(*rows, pad=pad, borders={0, 1})


# Vocabularies


def wide_base(rows: int) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **shape, pad_token_id=PAD, eos_token_id=EOS)).eval()


def test_ids_that_only_pad_the_base_models_table_are_forbidden() -> None:
    base, model = wide_base(130), make_value_model("a")
    with torch.no_grad():
        base.lm_head.weight[100:] *= 20  # they would be candidates
    call: dict[str, Any] = {"do_sample": True, "max_new_tokens": 6, "pad_token_id": PAD, "top_k": 0}
    batch = padded([[11, 12, 13], [14]], PAD)
    forbidden = {"suppress_tokens": list(range(VOCABULARY, 130))}
    tokenizer = Words(pad=PAD, eos=EOS, size=VOCABULARY - 5)

    def processor(**settings: Any) -> dict[str, Any]:
        mavis = MavisLogitsProcessor(model, beta=BETA, top_k=K, model=base, **settings)
        return {"logits_processor": LogitsProcessorList([mavis])}

    def sampling(**settings: Any) -> dict[str, Any]:
        return {"custom_generate": MavisSampling(model, beta=BETA, top_k=K, model=base, **settings)}

    for kind in (processor, sampling):
        for unscored in ("drop", "keep", "expected"):
            torch.manual_seed(0)
            expected = base.generate(**batch, **call, **forbidden, **kind(unscored=unscored))
            torch.manual_seed(0)
            assert torch.equal(expected, base.generate(**batch, **call, **kind(unscored=unscored, tokenizer=tokenizer)))
            assert (expected < VOCABULARY).all()
        with pytest.raises(ValueError, match=r"knows 97 tokens.*have 130.*tokenizer=.*suppress_tokens"):
            base.generate(**batch, **call, **kind())
        with pytest.raises(ValueError, match="made for another tokenizer"):
            base.generate(**batch, **call, **kind(tokenizer=Words(size=VOCABULARY + 1)))


@pytest.mark.parametrize("kind", ["model", "head", "inner head"])
def test_embeddings_resized_after_attaching(base: PreTrainedModel, kind: str) -> None:
    function = make_value_model("a") if kind == "model" else make_head(base, "a", layer=1 if "inner" in kind else None)
    call = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD}
    ids = torch.tensor([[5, 6, 7]])
    mavis = MavisLogitsProcessor(function, beta=BETA, top_k=K, model=base)
    before = base.generate(ids, **call, logits_processor=[mavis])
    base.resize_token_embeddings(VOCABULARY + 8, mean_resizing=False)
    more = {"suppress_tokens": list(range(VOCABULARY, VOCABULARY + 8))}
    if kind == "model":
        assert torch.equal(base.generate(ids, **call, **more, logits_processor=[mavis]), before)
        return
    for _ in range(2):
        with pytest.raises(ValueError, match=r"97 x 32.*105 x 32|105 x 32.*97 x 32"):
            base.generate(ids, **call, **more, logits_processor=[mavis])


def test_an_output_layer_of_the_same_weights_is_followed(base: PreTrainedModel) -> None:
    call = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD}
    ids = torch.tensor([[5, 6, 7]])
    mavis = MavisLogitsProcessor(make_head(base, "a"), beta=BETA, top_k=K, model=base)
    before = base.generate(ids, **call, logits_processor=[mavis])
    layer = torch.nn.Linear(32, VOCABULARY, bias=False)
    layer.weight = torch.nn.Parameter(base.get_output_embeddings().weight.detach().clone())
    base.set_output_embeddings(layer)
    assert torch.equal(base.generate(ids, **call, logits_processor=[mavis]), before)
    assert mavis.stats.passed_through == 0


# Prompts that are no ids


@pytest.mark.parametrize("keeps_one", [True, False], ids=["last position", "all positions"])
def test_value_heads_steer_prompts_given_as_embeddings(keeps_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base()
    if not keeps_one:
        monkeypatch.setattr(type(base), "_supports_logits_to_keep", lambda self: False)
    batch = padded([[11, 12, 13], [14, 15]], PAD)
    call = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": PAD, "attention_mask": batch["attention_mask"]}
    for layer in (None, 1):
        mavis = MavisLogitsProcessor(make_head(base, "a", layer=layer), beta=8.0, top_k=K, model=base, trace=True)
        expected = base.generate(batch["input_ids"], **call, logits_processor=[mavis])[:, 3:]
        embeddings = base.get_input_embeddings()(batch["input_ids"])
        assert torch.equal(base.generate(inputs_embeds=embeddings, **call, logits_processor=[mavis]), expected)
        assert mavis.stats.passed_through == 0


def test_value_models_and_strategies_refuse_embeddings(base: PreTrainedModel) -> None:
    embeddings = base.get_input_embeddings()(torch.tensor([[5, 6, 7]]))
    call = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": PAD}
    for model in (base, None):
        mavis = MavisLogitsProcessor(make_value_model("a"), beta=BETA, top_k=K, model=model)
        with pytest.raises(ValueError, match="inputs_embeds"):
            base.generate(inputs_embeds=embeddings, **call, logits_processor=[mavis])
    both = MavisLogitsProcessor({"a": make_head(base, "a"), "b": make_value_model("b")}, top_k=K, model=base)
    with pytest.raises(ValueError, match=r"inputs_embeds.*\['b'\]"):
        base.generate(inputs_embeds=embeddings, **call, logits_processor=[both])
    with pytest.raises(ValueError, match="inputs_embeds"):
        base.generate(inputs_embeds=embeddings, **call, custom_generate=MavisSampling(make_head(base, "a"), model=base))
    # The way out that is named: ids beside them.
    ids = torch.tensor([[5, 6, 7]])
    mavis = steer(make_value_model("a"), model=base)
    base.generate(ids, inputs_embeds=embeddings, **call, logits_processor=[mavis])
    mavis.hold([[5, 6, 7]])


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_value_models_never_see_an_encoders_prompt_and_refuse_it(kind: str) -> None:
    torch.manual_seed(0)
    ids = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": 2}
    base: Any
    if kind == "t5":
        base = T5ForConditionalGeneration(T5Config(**ids, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    else:
        shape = {f"{side}_{name}": size for side in ("encoder", "decoder")
                 for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
        base = BartForConditionalGeneration(BartConfig(**ids, d_model=32, max_position_embeddings=64, **shape))
    base.eval()
    for how in (MavisLogitsProcessor, MavisSampling):
        with pytest.raises(ValueError, match=rf"{type(base).__name__} reads its prompts with an encoder.*value heads"):
            how(make_value_model("a"), model=base, top_k=K)
    later = MavisSampling(make_value_model("a"), top_k=K)
    with pytest.raises(ValueError, match="reads its prompts with an encoder"):
        base.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, custom_generate=later)
    mavis = MavisLogitsProcessor(ValueHead.for_model(base, ["a"], width=16), beta=8.0, model=base, top_k=K)
    base.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, logits_processor=[mavis])
    assert mavis.stats.passed_through == 0
    assert mavis.stats.steps == 3


def test_images_beside_the_text_are_refused_with_value_models(base: PreTrainedModel) -> None:
    assert unreadable({"input_ids": 1, "pixel_values": None, "image_sizes": 2}) == "image_sizes"
    assert unreadable({"input_ids": 1, "attention_mask": 2, "token_type_ids": 3}) is None
    forward = type(base).forward
    ids = torch.tensor([[5, 6, 7]])

    class Seeing(type(base)):  # type: ignore[misc]
        def forward(self, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
            return forward(self, *args, **kwargs)

        def prepare_inputs_for_generation(self, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **kwargs) | {"pixel_values": pixel_values}

    base.__class__ = Seeing
    call = {"do_sample": False, "max_new_tokens": 2, "pad_token_id": PAD, "pixel_values": torch.ones(1, 3)}
    mavis = MavisLogitsProcessor(make_value_model("a"), model=base, top_k=K)
    with pytest.raises(ValueError, match=r"also given pixel_values.*use value heads"):
        base.generate(ids, **call, logits_processor=[mavis])
    with pytest.raises(ValueError, match=r"pixel_values is for the base model.*use value heads"):
        base.generate(ids, **call, custom_generate=MavisSampling(make_value_model("a"), model=base, top_k=K))
    base.generate(ids, **call, logits_processor=[MavisLogitsProcessor(make_head(base, "a"), model=base, top_k=K)])
    base.generate(ids, **call | {"pixel_values": None}, logits_processor=[mavis])


@pytest.mark.parametrize("config", [
    PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
], ids=lambda config: type(config).__name__)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_soft_prompts_are_read_by_processor_and_strategies(base: PreTrainedModel, config: Any) -> None:
    tuned = get_peft_model(base, config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.prompt_encoder.parameters():
            parameter.normal_()
    rows = [[5, 6, 7], [8, 9, 10, 11, 12]]
    call = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "eos_token_id": END}
    mavis = steer(make_value_model("a"), model=tuned)
    output = tuned.generate(**padded(rows, PAD), **call, logits_processor=LogitsProcessorList([mavis]))
    mavis.hold(rows)
    # What generate itself reads (PEFT's prefix does not reach a model of transformers 5.24), of a row without padding,
    # which PEFT takes for positions.
    alone = tuned.generate(
        input_ids=torch.tensor(rows[1:]), **call, output_logits=True, return_dict_in_generate=True
    ).logits[0][0]
    torch.testing.assert_close(mavis.calls[0][1][1], alone, atol=1e-4, rtol=1e-4)
    sampling = MavisSampling(make_value_model("a"), beta=BETA, top_k=K, model=tuned)
    assert torch.equal(tuned.generate(**padded(rows, PAD), **call, custom_generate=sampling), output)
