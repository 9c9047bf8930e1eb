"""What stands on the page, part by part, in the order in which it is read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gradio as gr

from .plot import picture
from .session import Session
from .settings import KL, LENGTH, PRESET_KL, TEMPERATURE, WEIGHT, Choice

UNSTEERED, STEERED = "Unsteered", "Steered"
EXAMPLES = ["How do I make good tea?", "Tell me about the moon.", "What should I cook tonight?"]
ABOUT = """# mavis: steer a language model while it writes
Ask something, move a slider, ask again. The left answer is the model's own; the right one is tilted, token by token,
towards what the sliders ask for, as far as the budget goes."""
_LEGEND = """<div id="legend">Each token: less likely than unsteered<span class="scale"></span>likelier (3 nats).
Point at one, tap it or reach it with Tab to see what it was chosen from.</div>"""
_PLOT_NOTE = """What the value functions foresee of each whole answer, in standard deviations of the rewards that they
were trained on, over how far the answer is from the unsteered model. It is their own forecast, and no judgement by
others."""
_SNIPPETS = (("Python", "python"), ("command", "shell"), ("curl", "shell"))


class Question(NamedTuple):
    """Where something is asked."""

    prompt: gr.Textbox
    send: gr.Button
    stop: gr.Button


class Presets(NamedTuple):
    """Buttons that set all sliders."""

    buttons: list[gr.Button]
    reset: gr.Button


class Controls(NamedTuple):
    """What an answer is steered by."""

    sliders: list[gr.Slider]
    kl: gr.Slider
    temperature: gr.Slider
    length: gr.Slider
    seed: gr.Number

    @property
    def settings(self) -> list[Any]:
        """All but the weights."""
        return [self.kl, self.temperature, self.length, self.seed]


class Answers(NamedTuple):
    """The two texts."""

    unsteered: gr.HTML
    steered: gr.HTML


class Snippets(NamedTuple):
    """Code for the settings as they are, and what copies it."""

    codes: list[gr.Code]
    copies: list[gr.Button]


class Models(NamedTuple):
    """What may be picked, and what loads it."""

    model: gr.Dropdown
    values: gr.Dropdown
    load: gr.Button


class Tools(NamedTuple):
    """The tabs beside the answers."""

    plot: gr.HTML
    listed: gr.Dataset
    snippets: Snippets
    models: Models


def question() -> Question:
    """The first row, and examples below it."""
    with gr.Row(equal_height=True):
        prompt = gr.Textbox(
            label="Question", placeholder="Ask something, then press Enter", lines=1, max_lines=6, scale=5,
            autofocus=True, elem_id="prompt", min_width=260,
        )  # fmt: skip
        send = gr.Button("Answer", variant="primary", scale=1, min_width=100, elem_id="send")
        stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
    gr.Examples([[text] for text in EXAMPLES], prompt, label="For example")
    return Question(prompt, send, stop)


def preset_buttons(buttons: Sequence[Mapping[str, Any]]) -> Presets:
    """A button for each of these properties, and one for none."""
    with gr.Row(elem_id="presets"):
        made = [gr.Button(size="sm", min_width=50, elem_id=f"preset-{i}", **each) for i, each in enumerate(buttons)]
        return Presets(made, gr.Button("none", size="sm", min_width=50, elem_id="preset-none"))


def controls(sliders: Sequence[Mapping[str, Any]], temperature: float, length: int, seed: int) -> Controls:
    """A slider for each of these properties, and the other settings."""
    with gr.Column(min_width=0, elem_id="controls"):
        weights = [
            _slider(*WEIGHT, step=0.05, elem_id=f"weight-{i}", min_width=120, buttons=[], **each)
            for i, each in enumerate(sliders)
        ]
        gr.Markdown("Right: more of it. Left: less. Middle: no say.", elem_classes="note")
        budget = _slider(
            *KL, value=PRESET_KL, step=0.5, label="Strength: budget of an answer, in nats", elem_id="kl",
            info="How far it may go from the model. 0: not at all.",
        )  # fmt: skip
        sharpness = _slider(
            *TEMPERATURE, value=temperature, step=0.05, label="Temperature of the model", elem_id="temperature"
        )
        longest = _slider(*LENGTH, value=length, step=1, label="Length at most, in tokens", elem_id="length")
        number = gr.Number(seed, precision=None, step=1, label="Seed: another one, another answer", elem_id="seed")
    return Controls(weights, budget, sharpness, longest, number)


def answers() -> Answers:
    """Both answers side by side, and how to read them."""
    with gr.Column(min_width=0, elem_id="answers"):
        with gr.Row(elem_id="pair"):
            unsteered = gr.HTML(titled(UNSTEERED), elem_id="unsteered", min_width=240)
            steered = gr.HTML(titled(STEERED), elem_id="steered", min_width=240)
        gr.HTML(_LEGEND)
    return Answers(unsteered, steered)


def tools(choices: Sequence[Choice], open_choice: bool) -> Tools:
    """Trade-off, history, code and models; the first of the choices is picked."""
    with gr.Column(min_width=0, elem_id="more"):
        with gr.Tab("Trade-off"):
            plot = gr.HTML(picture(Session()), elem_id="plot")
            gr.Markdown(_PLOT_NOTE, elem_classes="note")
        with gr.Tab("History"):
            listed = gr.Dataset(
                components=["text"] * 4, samples=[], type="index", layout="table", elem_id="history",
                headers=["question", "settings", "nats", "steered answer"], label="Pick one",
            )  # fmt: skip
        with gr.Tab("Code"):
            snippets = Snippets([], [])
            for name, language in _SNIPPETS:
                key = name.lower()
                snippets.copies.append(gr.Button(f"Copy {name}", size="sm", elem_id=f"copy-{key}"))
                code = gr.Code(
                    language=language, interactive=False, elem_id=f"code-{key}", show_label=False, wrap_lines=True,
                    lines=1, max_lines=40,
                )  # fmt: skip
                snippets.codes.append(code)
        with gr.Tab("Model"):
            models = _models(choices, open_choice)
    return Tools(plot, listed, snippets, models)


def _models(choices: Sequence[Choice], open_choice: bool) -> Models:
    model = gr.Dropdown(
        list(dict.fromkeys(each.model for each in choices)), value=choices[0].model, label="Language model",
        allow_custom_value=open_choice, elem_id="model",
    )  # fmt: skip
    values = gr.Dropdown(
        [(of_values(each), shlex.join(each.values)) for each in choices], value=shlex.join(choices[0].values),
        label="Value functions, or a bundle", elem_id="values", allow_custom_value=open_choice,
    )  # fmt: skip
    return Models(model, values, gr.Button("Load", size="sm", elem_id="load"))


def _slider(*given: Any, **named: Any) -> gr.Slider:
    """A slider whose range `Settings` checks, which tells what is wrong on the page and not by a traceback."""
    slider = gr.Slider(*given, **named)
    slider.preprocess = lambda payload: payload  # type: ignore[method-assign]
    return slider


def titled(title: str, text: str = "") -> str:
    """An answer below its title."""
    return f"<h2>{title}</h2>{text}"


def named(choice: Choice) -> str:
    """A choice in words."""
    return f"{choice.model}, steered by {of_values(choice)}"


def of_values(choice: Choice) -> str:
    """Its value functions in words."""
    parts = [*choice.values, *choice.words]
    return ", ".join(parts) or "the value heads that are shipped"
