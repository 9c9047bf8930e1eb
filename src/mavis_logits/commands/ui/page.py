"""The page itself, in Gradio: what happens when somebody touches something (`layout` has what)."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ...steering.trace_html import parts_style
from . import layout, snippets
from .engine import Answer, Engine, Engines
from .layout import EXAMPLES, STEERED, UNSTEERED, named, titled
from .plot import picture
from .session import Entry, Session, coloured, plain, progress, status
from .settings import PRESET_KL, PRESETS, Choice, Settings, check_prompt, presets

MOST_OBJECTIVES = 12
_HERE = Path(__file__).parent
_REFRESH = 0.2  # seconds between two looks at an answer
_QUICK: Any = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


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
            yield (status("busy", "Reading the question …"), titled(UNSTEERED), titled(STEERED), *unchanged)
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
            told = f"{_said(error)} The page goes on with {named(choice)}."
            yield (status("failed", told), choice, *[gr.skip()] * rest)
            return
        yield (status("ready", f"Ready: {named(wanted)}."), wanted, gr.skip(), gr.skip(), engine.temperature,
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
        start = engine.temperature if self.temperature is None else self.temperature
        with gr.Blocks(title="mavis: steer a language model", analytics_enabled=False) as blocks:
            state = gr.State(first), gr.State(Session())
            gr.Markdown(layout.ABOUT, elem_id="about")
            question = layout.question()
            told = gr.HTML(status("ready", f"Ready: {named(first)}."), elem_id="status")
            buttons = layout.preset_buttons(self._presets(engine, first=True))
            with gr.Row(elem_id="work"):
                controls = layout.controls(self._sliders(engine, first=True), start, self.length, self.seed)
                answers = layout.answers()
                tools = layout.tools(self.choices, self.open_choice)
            self._on_questions(question, controls, told, answers, tools, *state)
            self._on_settings(blocks, question, controls, buttons, tools, state[0])
            self._on_choices(question, controls, buttons, told, answers, tools, *state)
            gr.api(self.api, api_name=snippets.API, concurrency_limit=self.visitors, concurrency_id="answers")
        return blocks

    def _on_questions(
        self, question: layout.Question, controls: layout.Controls, told: gr.HTML, answers: layout.Answers,
        tools: layout.Tools, choice: gr.State, session: gr.State,
    ) -> None:  # fmt: skip
        """Something is asked, or no longer wanted."""
        busy = gr.Checkbox(visible=False)
        gr.on(
            [question.send.click, question.prompt.submit], self.answer,
            [question.prompt, *controls.settings, choice, session, *controls.sliders],
            [told, *answers, tools.plot, tools.listed, session], trigger_mode="once", show_progress="hidden",
            concurrency_limit=self.visitors, concurrency_id="answers", api_visibility="private",
            api_name="page",  # not that of `api`
            js="(...given) => { window.mavisWaiting(); return given; }",
        )  # fmt: skip
        waits = "() => [document.querySelector('#status .busy') !== null]"
        question.stop.click(self.stop, busy, js=waits, **_QUICK)

    def _on_settings(
        self, blocks: gr.Blocks, question: layout.Question, controls: layout.Controls, presets: layout.Presets,
        tools: layout.Tools, choice: gr.State,
    ) -> None:  # fmt: skip
        """A preset is pressed, or anything changes that the code to copy depends on."""
        for button, name in zip(presets.buttons, presets_in_order(), strict=True):
            button.click(
                lambda own, nats, name=name: self.preset(name, own, nats), [choice, controls.kl],
                [controls.kl, *controls.sliders], **_QUICK,
            )  # fmt: skip
        presets.reset.click(lambda: [0.0] * len(controls.sliders), None, controls.sliders, **_QUICK)
        every = [question.prompt, *controls.settings, choice, *controls.sliders]
        changes = [blocks.load, *(each.change for each in every)]
        gr.on(changes, self.code, every, tools.snippets.codes, trigger_mode="always_last", **_QUICK)
        for copy, code in zip(tools.snippets.copies, tools.snippets.codes, strict=True):
            script = f"(text) => window.mavisCopy(text, '#{copy.elem_id}')"
            copy.click(None, code, js=script, api_visibility="private")

    def _on_choices(
        self, question: layout.Question, controls: layout.Controls, presets: layout.Presets, told: gr.HTML,
        answers: layout.Answers, tools: layout.Tools, choice: gr.State, session: gr.State,
    ) -> None:  # fmt: skip
        """Another model or bundle is loaded, or an answer of the list is shown again."""
        models = tools.models
        models.load.click(
            self.pick, [models.model, models.values, choice],
            [told, choice, *answers, controls.temperature, *controls.sliders, *presets.buttons],
            show_progress="hidden", concurrency_limit=1, api_visibility="private",
        )  # fmt: skip
        tools.listed.click(
            self.again, [tools.listed, session],
            [told, *answers, choice, question.prompt, *controls.settings, *controls.sliders, *presets.buttons],
            **_QUICK,
        )  # fmt: skip

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
            offered = "; ".join(map(named, self.choices))
            raise ValueError(f"this page offers {offered}; not {model} with {' '.join(values) or 'the shipped heads'}")
        return Choice(str(model), tuple(map(str, values)))

    def _check_count(self, engine: Engine) -> None:
        if len(engine.objectives) > MOST_OBJECTIVES:
            raise ValueError(
                f"{named(engine.choice)} has {len(engine.objectives)} objectives, and the page sliders for "
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
    return titled(UNSTEERED, plain(unsteered)), titled(STEERED, coloured(steered))


def _said(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text[:1].upper() + text[1:]


def _whole(number: Any) -> Any:
    """A slider's number as the whole number that it is; else as it is, to be told of."""
    return int(number) if isinstance(number, float) and number == int(number) else number
