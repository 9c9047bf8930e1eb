"""The page itself, in Gradio: components, and what happens when somebody touches them."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...steering.trace_html import parts_style
from . import snippets
from .engine import Answer, Engine, Engines
from .plot import picture
from .session import Entry, Session, coloured, plain, progress, status
from .settings import KL, LENGTH, PRESET_KL, PRESETS, TEMPERATURE, WEIGHT, Choice, Settings, check_prompt, presets

MOST_OBJECTIVES = 12
UNSTEERED, STEERED = "Unsteered", "Steered"
EXAMPLES = ["How do I make good tea?", "Tell me about the moon.", "What should I cook tonight?"]
_HERE = Path(__file__).parent
_REFRESH = 0.2  # seconds between two looks at an answer
_ABOUT = """# mavis: steer a language model while it writes
Ask something, move a slider, ask again. The left answer is the model's own; the right one is tilted, token by token,
towards what the sliders ask for, as far as the budget goes."""
_LEGEND = """<div id="legend">Each token: less likely than unsteered<span class="scale"></span>likelier (3 nats).
Point at one, tap it or reach it with Tab to see what it was chosen from.</div>"""
_PLOT_NOTE = """What the value functions foresee of each whole answer, in standard deviations of the rewards that they
were trained on, over how far the answer is from the unsteered model. It is their own forecast, and no judgement by
others."""


def _slider(*given: Any, **named: Any) -> gr.Slider:
    """A slider whose range `Settings` checks, which tells what is wrong on the page and not by a traceback."""
    slider = gr.Slider(*given, **named)
    slider.preprocess = lambda payload: payload  # type: ignore[method-assign]
    return slider


class Page:
    """The page and what its visitors have under way.

    Args:
        engines: where models come from; that of `choices[0]` has been loaded.
        choices: to pick from; the first is picked to begin with.
        open_choice: whether visitors may name others, which are then loaded from this machine or the Hub.
        visitors: answers (two texts each) that are written at once; further visitors wait in a queue.
        length, temperature, seed: that the page begins with; of the temperature None for what is recommended.
    """

    def __init__(
        self,
        engines: Engines,
        choices: Sequence[Choice],
        open_choice: bool = False,
        visitors: int = 2,
        length: int = 48,
        temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        self.engines, self.choices, self.open_choice = engines, list(choices), open_choice
        self.visitors, self.length, self.temperature, self.seed = visitors, length, temperature, seed
        self.running: dict[str, list[Answer]] = {}  # by the visitor's session
        self.unwanted: set[str] = set()  # visitors who stopped what waits for its turn
        self.url = ""  # of the page, once it is served
        self._check_count(engines.get(choices[0]))
        self.blocks = self._build()

    # What visitors do ----------------------------------------------------------------------------------------------

    def answer(
        self, request: gr.Request, prompt: str, kl: float, temperature: float, length: float, seed: float,
        choice: Choice, session: Session, *sliders: float,
    ) -> Iterator[tuple[Any, ...]]:  # fmt: skip
        """Write both answers; yields status, both texts, and at the end the plot, the list and the session."""
        unchanged, visitor = (gr.skip(), gr.skip(), gr.skip()), str(request.session_hash)
        own: list[Answer] = []
        self.running[visitor] = own
        try:
            if visitor in self.unwanted:
                yield (status("stopped", "Stopped before it began."), gr.skip(), gr.skip(), *unchanged)
                return
            engine = self.engines.get(choice)
            settings = self._settings(engine, kl, temperature, length, seed, sliders)
            prompt = check_prompt(prompt)
            yield (status("busy", "Reading the question …"), _titled(UNSTEERED), _titled(STEERED), *unchanged)
            for steered in (False, True):
                own.append(engine.begin(prompt, settings, steered))
            while "writing" in [answer.look() for answer in own]:
                yield (progress(*own), *_texts(*own), *unchanged)
                time.sleep(_REFRESH)
            told, (left, right) = progress(*own), _texts(*own)
            if "failed" in [answer.state for answer in own]:
                yield (told, left, right, *unchanged)
                return
            unsteered, answer = own
            session = session.with_entry(
                Entry(
                    choice, prompt, settings, unsteered=left, steered=right, text=answer.text, kl=answer.kl,
                    values=answer.values(), unsteered_values=unsteered.values(), told=told,
                )
            )  # fmt: skip
            yield (told, left, right, picture(session), _listed(session), session)
        except (ValueError, OSError, ImportError) as error:
            yield (status("failed", _said(error)), gr.skip(), gr.skip(), *unchanged)
        finally:  # also where the visitor has gone
            for answer in own:
                answer.stop()
            self.running.pop(visitor, None)
            self.unwanted.discard(visitor)

    def stop(self, request: gr.Request, busy: bool) -> None:
        """Stop this visitor's answers, and one that waits for its turn (`busy`); what has been written stays."""
        visitor = str(request.session_hash)
        answers = self.running.get(visitor)
        for answer in list(answers or ()):
            answer.stop()
        if busy and answers is None:
            self.unwanted.add(visitor)

    def api(
        self, prompt: str, weights: dict[str, float], kl: float, temperature: float, max_new_tokens: int, seed: int,
        model: str, values: list[str],
    ) -> dict[str, Any]:  # fmt: skip
        """One steered answer for programs: its text, tokens, divergence in nats and values."""
        try:
            engine = self.engines.get(self._allowed(model, values))
            answer = engine.begin(prompt, Settings(weights, kl, temperature, max_new_tokens, seed))
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(_said(error), print_exception=False) from error
        answer.join()
        if answer.state == "failed":
            raise gr.Error(answer.error, print_exception=False)
        return {"text": answer.text, "tokens": len(answer.ids), "kl": answer.kl, "values": answer.values()}

    def pick(self, model: str, values: str, choice: Choice) -> Iterator[tuple[Any, ...]]:
        """Load another choice; yields status, the choice, and how the sliders and presets are then."""
        rest = 3 + MOST_OBJECTIVES + 3
        yield (status("busy", f"Loading {model} with {values or 'the value heads that are shipped'} …"), choice,
               *[gr.skip()] * rest)  # fmt: skip
        try:
            wanted = self._allowed(model, shlex.split(values or ""))
            engine = self.engines.get(wanted)
            self._check_count(engine)
        except (ValueError, OSError, ImportError) as error:
            told = f"{_said(error)} The page goes on with {_named(choice)}."
            yield (status("failed", told), choice, *[gr.skip()] * rest)
            return
        yield (status("ready", f"Ready: {_named(wanted)}."), wanted, gr.skip(), gr.skip(), engine.temperature,
               *self._sliders(engine), *self._presets(engine))  # fmt: skip

    def preset(self, button: str, choice: Choice, kl: float) -> list[Any]:
        """The budget, if need be as large as something is to be seen by, and the sliders of a preset."""
        engine = self.engines.get(choice)
        objective = presets(engine.objectives).get(button)
        values = [float(name == objective) for name in engine.objectives]
        return [max(kl, PRESET_KL), *values, *[0.0] * (MOST_OBJECTIVES - len(values))]

    def code(
        self, request: gr.Request, prompt: str, kl: float, temperature: float, length: float, seed: float,
        choice: Choice, *sliders: float,
    ) -> list[str]:  # fmt: skip
        """Python, command line and curl for the settings as they are."""
        try:
            engine = self.engines.get(choice)
            settings = self._settings(engine, kl, temperature, length, seed, sliders)
            asked = (prompt or "").strip() or EXAMPLES[0]
            return [
                snippets.python(choice, asked, settings),
                snippets.command(choice, asked, settings),
                snippets.curl(request.headers.get("origin", self.url), choice, asked, settings),
            ]
        except (ValueError, OSError, ImportError) as error:
            return [f"# {_said(error)}"] * 3

    def again(self, number: int, session: Session) -> list[Any]:
        """Show an answer of the list once more, with its settings."""
        entry = session.entries[len(session.entries) - 1 - number]
        engine = self.engines.get(entry.choice)
        weights = [entry.settings.weights.get(name, 0.0) for name in engine.objectives]
        own = entry.settings
        sliders = [each | {"value": weight} for each, weight in zip(self._sliders(engine), weights, strict=False)]
        sliders += self._sliders(engine)[len(weights) :]
        return [entry.told, entry.unsteered, entry.steered, entry.choice, entry.prompt, own.kl, own.temperature,
                own.max_new_tokens, own.seed, *sliders, *self._presets(engine)]  # fmt: skip

    # How it looks ---------------------------------------------------------------------------------------------------

    def launch(self, host: str, port: int | None, **options: Any) -> str:
        """Serve the page in threads of its own, and return its address."""
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
        style = parts_style() + (_HERE / "page.css").read_text(encoding="utf-8")
        script = f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>"
        self.blocks.queue(default_concurrency_limit=self.visitors, max_size=64)
        _, self.url, _ = self.blocks.launch(
            server_name=host, server_port=port, theme=theme, css=style, head=script, prevent_thread_lock=True,
            quiet=True, show_error=True, footer_links=[], **options,
        )  # fmt: skip
        return self.url

    def _build(self) -> gr.Blocks:
        first = self.choices[0]
        engine = self.engines.get(first)
        with gr.Blocks(title="mavis: steer a language model", analytics_enabled=False) as blocks:
            choice, session = gr.State(first), gr.State(Session())
            gr.Markdown(_ABOUT, elem_id="about")
            with gr.Row(equal_height=True):
                prompt = gr.Textbox(
                    label="Question", placeholder="Ask something, then press Enter", lines=1, max_lines=6, scale=5,
                    autofocus=True, elem_id="prompt", min_width=260,
                )  # fmt: skip
                send = gr.Button("Answer", variant="primary", scale=1, min_width=100, elem_id="send")
                stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
            gr.Examples([[text] for text in EXAMPLES], prompt, label="For example")
            told = gr.HTML(status("ready", f"Ready: {_named(first)}."), elem_id="status")
            with gr.Row(elem_id="presets"):
                buttons = [
                    gr.Button(size="sm", min_width=50, elem_id=f"preset-{i}", **each)
                    for i, each in enumerate(self._presets(engine, first=True))
                ]
                reset = gr.Button("none", size="sm", min_width=50, elem_id="preset-none")
            with gr.Row(elem_id="work"):
                with gr.Column(min_width=0, elem_id="controls"):
                    sliders = [
                        _slider(*WEIGHT, step=0.05, elem_id=f"weight-{i}", min_width=120, buttons=[], **each)
                        for i, each in enumerate(self._sliders(engine, first=True))
                    ]
                    gr.Markdown("Right: more of it. Left: less. Middle: no say.", elem_classes="note")
                    kl = _slider(
                        *KL, value=PRESET_KL, step=0.5, label="Strength: budget of an answer, in nats", elem_id="kl",
                        info="How far it may go from the model. 0: not at all.",
                    )  # fmt: skip
                    start = engine.temperature if self.temperature is None else self.temperature
                    temperature = _slider(
                        *TEMPERATURE, value=start, step=0.05, label="Temperature of the model", elem_id="temperature"
                    )
                    length = _slider(
                        *LENGTH, value=self.length, step=1, label="Length at most, in tokens", elem_id="length"
                    )
                    seed = gr.Number(
                        self.seed, precision=None, step=1, label="Seed: another one, another answer", elem_id="seed"
                    )
                with gr.Column(min_width=0, elem_id="answers"):
                    with gr.Row(elem_id="pair"):
                        unsteered = gr.HTML(_titled(UNSTEERED), elem_id="unsteered",
                                            min_width=240)  # fmt: skip
                        steered = gr.HTML(_titled(STEERED), elem_id="steered",
                                          min_width=240)  # fmt: skip
                    gr.HTML(_LEGEND)
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
                        codes, copies = [], []
                        for name, language in (("Python", "python"), ("command", "shell"), ("curl", "shell")):
                            key = name.lower()
                            copies.append(gr.Button(f"Copy {name}", size="sm", elem_id=f"copy-{key}"))
                            codes.append(gr.Code(language=language, interactive=False, elem_id=f"code-{key}",
                                                 show_label=False, wrap_lines=True, lines=1, max_lines=40))  # fmt: skip
                    with gr.Tab("Model"):
                        model = gr.Dropdown(
                            list(dict.fromkeys(each.model for each in self.choices)), value=first.model,
                            label="Language model", allow_custom_value=self.open_choice, elem_id="model",
                        )  # fmt: skip
                        values = gr.Dropdown(
                            [(_of_values(each), shlex.join(each.values)) for each in self.choices],
                            value=shlex.join(first.values), label="Value functions, or a bundle", elem_id="values",
                            allow_custom_value=self.open_choice,
                        )  # fmt: skip
                        load = gr.Button("Load", size="sm", elem_id="load")

            busy = gr.Checkbox(visible=False)
            settings = [kl, temperature, length, seed]
            gr.on(
                [send.click, prompt.submit], self.answer, [prompt, *settings, choice, session, *sliders],
                [told, unsteered, steered, plot, listed, session], trigger_mode="once", show_progress="hidden",
                concurrency_limit=self.visitors, concurrency_id="answers", api_visibility="private",
                api_name="page",  # not that of `api`
                js="(...given) => { window.mavisWaiting(); return given; }",
            )  # fmt: skip
            quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
            stop.click(self.stop, busy, js="() => [document.querySelector('#status .busy') !== null]", **quick)
            for button, name in zip(buttons, presets_in_order(), strict=True):
                button.click(
                    lambda own, nats, name=name: self.preset(name, own, nats), [choice, kl], [kl, *sliders], **quick
                )
            reset.click(lambda: [0.0] * len(sliders), None, sliders, **quick)
            every = [prompt, *settings, choice, *sliders]
            gr.on(
                [blocks.load, *(each.change for each in every)], self.code, every, codes, trigger_mode="always_last",
                **quick,
            )  # fmt: skip
            for copy, code in zip(copies, codes, strict=True):
                copy.click(
                    None, code, js=f"(text) => window.mavisCopy(text, '#{copy.elem_id}')", api_visibility="private"
                )
            load.click(
                self.pick, [model, values, choice],
                [told, choice, unsteered, steered, temperature, *sliders, *buttons], show_progress="hidden",
                concurrency_limit=1, api_visibility="private",
            )  # fmt: skip
            listed.click(
                self.again, [listed, session],
                [told, unsteered, steered, choice, prompt, *settings, *sliders, *buttons], **quick,
            )  # fmt: skip
            gr.api(self.api, api_name=snippets.API, concurrency_limit=self.visitors, concurrency_id="answers")
        return blocks

    def _settings(
        self, engine: Engine, kl: float, temperature: float, length: float, seed: float, sliders: Sequence[float]
    ) -> Settings:
        weights = dict(zip(engine.objectives, sliders, strict=False))
        return Settings(weights, kl, temperature, _whole(length), _whole(seed))

    def _allowed(self, model: str, values: Sequence[str]) -> Choice:
        own = next((each for each in self.choices if (each.model, each.values) == (model, tuple(values))), None)
        if own is not None:
            return own
        if not self.open_choice:
            offered = "; ".join(map(_named, self.choices))
            raise ValueError(f"this page offers {offered}; not {model} with {' '.join(values) or 'the shipped heads'}")
        return Choice(str(model), tuple(map(str, values)))

    def _check_count(self, engine: Engine) -> None:
        if len(engine.objectives) > MOST_OBJECTIVES:
            raise ValueError(
                f"{_named(engine.choice)} has {len(engine.objectives)} objectives, and the page sliders for "
                f"{MOST_OBJECTIVES}: name fewer, as in --values NAME=FOLDER"
            )

    def _sliders(self, engine: Engine, first: bool = False) -> list[Any]:
        """Properties of all sliders, one of them set; `first`: for their making, else as an update."""
        names = engine.objectives
        begin = next(iter(presets(names).values()), names[0])
        every = [{"label": name, "value": float(name == begin), "visible": True} for name in names]
        every += [{"label": "-", "value": 0.0, "visible": False}] * (MOST_OBJECTIVES - len(names))
        return every if first else [gr.update(**each) for each in every]

    def _presets(self, engine: Engine, first: bool = False) -> list[Any]:
        there = presets(engine.objectives)
        every = [{"value": name, "visible": name in there} for name in presets_in_order()]
        return every if first else [gr.update(**each) for each in every]


def presets_in_order() -> list[str]:
    """All presets that a page has buttons for."""
    return list(PRESETS)


def _listed(session: Session) -> Any:
    return gr.Dataset(samples=[entry.row() for entry in reversed(session.entries)])


def _texts(unsteered: Answer, steered: Answer) -> tuple[str, str]:
    return _titled(UNSTEERED, plain(unsteered)), _titled(STEERED, coloured(steered))


def _titled(title: str, text: str = "") -> str:
    return f"<h2>{title}</h2>{text}"


def _named(choice: Choice) -> str:
    return f"{choice.model}, steered by {_of_values(choice)}"


def _of_values(choice: Choice) -> str:
    parts = [*choice.values, *choice.words]
    return ", ".join(parts) or "the value heads that are shipped"


def _said(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text[:1].upper() + text[1:]


def _whole(number: Any) -> Any:
    """A slider's number as the whole number that it is; else as it is, to be told of."""
    return int(number) if isinstance(number, float) and number == int(number) else number
