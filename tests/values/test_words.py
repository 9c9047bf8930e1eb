"""Where an instruction goes in a prompt, and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mavis_logits import MavisLogitsProcessor, MavisSampling, ValueModel
from mavis_logits.values.ensemble import ValueFunctions
from mavis_logits.values.words import Words
from tiny import PAD, make_base, make_head, make_value_model
from tiny_models import tiny_tokenizer

# Turns begin with w40 and their role (w41 system, w42 user, w43 assistant) and end with w44.
TURNS = (
    "{% for m in messages %}w40 {{ {'system': 'w41', 'user': 'w42', 'assistant': 'w43'}[m.role] }} {{ m.content }} w44 "
    "{% endfor %}{% if add_generation_prompt %}w40 w43{% endif %}"
)
DEFAULT = "{% if messages[0].role != 'system' %}w40 w41 w30 w31 w44 {% endif %}" + TURNS
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no such role') }}{% endif %}" + TURNS
JOKE, USER, OTHER = "w5 w6", {"role": "user", "content": "w1 w2"}, {"role": "system", "content": "w8"}


def tokenizer(template):
    found = tiny_tokenizer()
    found.chat_template = template
    return found


def instructed(template, prompt):
    own = tokenizer(template)
    if isinstance(prompt, str):
        ids = own(prompt)["input_ids"]
    else:
        ids = own.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    (place,) = Words({"joke": JOKE}, own).places(ids)
    return own.decode(ids[: place.start] + place.inserted + ids[place.start + place.removed :])


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        (TURNS, [USER], "w40 w41 w5 w6 w44 w40 w42 w1 w2 w44 w40 w43"),
        (TURNS, [OTHER, USER], "w40 w41 w8 w5 w6 w44 w40 w42 w1 w2 w44 w40 w43"),
        (TURNS, "w1 w2", "w5 w6 w1 w2"),
        (DEFAULT, [USER], "w40 w41 w5 w6 w44 w40 w42 w1 w2 w44 w40 w43"),
        (DEFAULT, [OTHER, USER], "w40 w41 w8 w5 w6 w44 w40 w42 w1 w2 w44 w40 w43"),
        (DEFAULT, [USER, {"role": "assistant", "content": "w3"}, USER],
         "w40 w41 w5 w6 w44 w40 w42 w1 w2 w44 w40 w43 w3 w44 w40 w42 w1 w2 w44 w40 w43"),
        (NO_SYSTEM, [USER], "w40 w42 w5 w6 w1 w2 w44 w40 w43"),
        (None, "w1 w2", "w5 w6 w1 w2"),
    ],
)  # fmt: skip
def test_an_instruction_goes_where_the_template_would_put_it(template, prompt, expected):
    assert instructed(template, prompt) == expected


def test_it_goes_behind_the_token_that_begins_texts():
    own = tiny_tokenizer()
    own.add_special_tokens({"bos_token": "w45"})
    from tokenizers.processors import TemplateProcessing

    own.backend_tokenizer.post_processor = TemplateProcessing("w45 $A", special_tokens=[("w45", own.bos_token_id)])
    (place,) = Words({"joke": JOKE}, own).places(own("w1 w2")["input_ids"])
    assert (place.start, place.removed) == (1, 0)


def steer(base, *given, **settings):
    return MavisLogitsProcessor(*given, model=base, tokenizer=tiny_tokenizer(), top_k=8, pad_token_id=PAD, **settings)


def test_a_weight_whose_name_is_a_sentence_is_an_objective_of_its_own():
    base = make_base()
    mavis = steer(base, make_head(base, "a"), {"a": 0.5, "w5 w6": 0.7})
    assert mavis.objectives == ["a", "w5 w6"]
    alone = steer(base, weights={"w5 w6": 1.0})
    named = steer(base, objectives={"joke": "w5 w6"}, weights={"joke": 1.0})
    ids = torch.tensor([[5, 6, 7]])
    outputs = [base.generate(ids, max_new_tokens=8, logits_processor=[each]) for each in (alone, named)]
    assert torch.equal(*outputs)


def test_they_mix_with_value_models_of_one_name_each():
    base = make_base()
    mavis = steer(base, {"a": make_value_model("x")}, {"a": 1.0}, objectives={"joke": "w5 w6"})
    assert mavis.objectives == ["a", "joke"]
    with pytest.raises(ValueError, match=r"give \['a'\] in words, and value functions predict them too"):
        steer(base, {"a": make_value_model("x")}, objectives={"a": "w5 w6"})


@pytest.mark.parametrize("normalize", ["none", "minmax"])
def test_with_beta_1_and_no_normalisation_it_is_the_model_under_the_instruction(normalize):
    base, ids = make_base(), torch.tensor([[5, 6, 7, 9]])
    own = tiny_tokenizer()
    mavis = MavisLogitsProcessor(
        objectives={"joke": JOKE}, weights={"joke": 1.0}, beta=1.0, top_k=None, normalize=normalize, model=base,
        tokenizer=own,
    )  # fmt: skip
    steered = base.generate(
        ids, max_new_tokens=1, logits_processor=[mavis], output_scores=True, return_dict_in_generate=True
    )
    prompt = torch.tensor([own(JOKE)["input_ids"] + ids[0].tolist()])
    expected = torch.log_softmax(base(prompt).logits[0, -1], dim=-1)
    same = torch.allclose(torch.log_softmax(steered.scores[0][0], dim=-1), expected, atol=1e-4)
    assert same == (normalize == "none")


def test_processors_in_front_do_not_count_as_something_that_the_words_say():
    # A penalty is part of the reference; were it part of what the words are compared with, they would take it back.
    base, ids = make_base(), torch.tensor([[5, 6, 7, 9]])
    found = []
    for make in (MavisLogitsProcessor, MavisSampling):
        mavis = make(
            objectives={"joke": JOKE}, weights={"joke": 1.0}, beta=0.7, top_k=None, normalize="none", model=base,
            tokenizer=tiny_tokenizer(),
        )  # fmt: skip
        how = {"logits_processor": [mavis]} if make is MavisLogitsProcessor else {"custom_generate": mavis}
        output = base.generate(
            ids, max_new_tokens=5, repetition_penalty=1.5, output_scores=True, return_dict_in_generate=True, **how
        )
        found.append(torch.log_softmax(torch.stack(output.scores), dim=-1))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    prompt = torch.tensor([tiny_tokenizer()(JOKE)["input_ids"] + ids[0].tolist()])
    plain, told = (torch.log_softmax(base(x).logits[0, -1], dim=-1) for x in (ids, prompt))
    penalised = base(ids).logits[0, -1]
    seen = penalised[ids[0]]
    penalised[ids[0]] = torch.where(seen < 0, seen * 1.5, seen / 1.5)
    expected = torch.log_softmax(penalised + 0.7 * (told - plain), dim=-1)
    torch.testing.assert_close(found[0][0, 0], expected, atol=1e-4, rtol=1e-4)


def test_with_an_assistant_the_draft_is_free_and_the_result_the_same():
    base, assistant = make_base(), make_base(seed=5)
    ids = torch.tensor([[5, 6, 7, 9]])
    mavis = steer(base, objectives={"joke": JOKE}, beta=3.0)
    plain = base.generate(ids, max_new_tokens=12, do_sample=False, logits_processor=[mavis])
    helped = base.generate(ids, max_new_tokens=12, do_sample=False, logits_processor=[mavis], assistant_model=assistant)
    assert torch.equal(plain, helped)


def test_a_copy_and_a_pickle_of_a_processor():
    base, ids = make_base(), torch.tensor([[5, 6, 7, 9]])
    mavis = steer(base, objectives={"joke": JOKE}, beta=3.0)
    expected = base.generate(ids, max_new_tokens=6, logits_processor=[mavis])
    assert torch.equal(base.generate(ids, max_new_tokens=6, logits_processor=[copy.deepcopy(mavis)]), expected)
    loaded = pickle.loads(pickle.dumps(mavis)).attach(base)
    assert torch.equal(base.generate(ids, max_new_tokens=6, logits_processor=[loaded]), expected)


def test_what_cannot_be_is_told():
    base = make_base()
    with pytest.raises(ValueError, match="must be an instruction in words, got '  '"):
        steer(base, objectives={"joke": "  "})
    with pytest.raises(ValueError, match="pass tokenizer=tokenizer"):
        MavisLogitsProcessor(objectives={"joke": JOKE}, model=base)
    with pytest.raises(ValueError, match="no value function given"):
        MavisLogitsProcessor(model=base)
    mavis = MavisLogitsProcessor(objectives={"joke": JOKE}, tokenizer=tiny_tokenizer())
    with pytest.raises(ValueError, match="pass model=model"):
        base.generate(torch.tensor([[5, 6]]), max_new_tokens=2, logits_processor=[mavis])
    with pytest.raises(ValueError, match=r"a sequence has 513 tokens, more than the 512"):
        base.generate(
            torch.full((1, 510), 5), max_new_tokens=2, logits_processor=[steer(base, objectives={"j": "w5 w6 w7"})]
        )


def test_without_weight_they_are_not_read():
    base = make_base()
    mavis = steer(base, make_head(base, "a"), {"a": 1.0}, objectives={"joke": JOKE})
    read = []
    base.register_forward_pre_hook(lambda *_: read.append(1))
    base.generate(torch.tensor([[5, 6]]), max_new_tokens=4, logits_processor=[mavis])
    assert len(read) == 4


def test_value_functions_know_which_are_words():
    base = make_base()
    functions = ValueFunctions([make_value_model("a"), Words({"joke": JOKE}, tiny_tokenizer(), base)])
    assert [type(f) for f in functions.value_models] == [ValueModel]
    assert [f.config.instructions for f in functions.words] == [[JOKE]]


def test_from_pretrained_takes_words_that_have_no_base_model_yet(tmp_path):
    base = make_base()
    make_head(base, "a").save_pretrained(tmp_path)
    words = Words({"joke": JOKE}, tiny_tokenizer())
    mavis = MavisLogitsProcessor.from_pretrained({"a": str(tmp_path), "joke": words}, model=base)
    assert mavis.objectives == ["a", "joke"]
    base.generate(torch.tensor([[5, 6]]), max_new_tokens=2, logits_processor=[mavis])
