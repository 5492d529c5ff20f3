"""The page: a form that asks for videos, the queue, and a gallery of what was made.

It asks the same desk as the API. So what it has asked for is a job like others, which a closed tab does not end, and a
page that is opened later shows it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Before Gradio is imported: it asks nobody about its version, and tells nobody of its use.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from fastapi import FastAPI

from sgm.inference.options import STRENGTH
from sgm.serve import views
from sgm.serve.answers import ApiError
from sgm.serve.desk import Desk, same_again
from sgm.serve.jobs import FAST, FEW_STEPS, FULL, Job, ModelFacts
from sgm.serve.parameters import STRENGTHS
from sgm.serve.records import RecordError, left_out, read_fields
from sgm.serve.uploads import Upload

TICK_SECONDS = 1.0
GALLERY = 48  # clips that are shown
MODES = {FULL: "Full quality", FAST: "Fast", FEW_STEPS: "Few steps"}
NO_ADAPTER = "none"
TITLE = "CogVideoX"


def with_page(app: FastAPI, desk: Desk) -> FastAPI:
    """`app` with the page at `/`."""
    page = Page(desk)
    fonts: list[Any] = ["system-ui", "sans-serif"]  # of the visitor's own: the page loads nothing from elsewhere
    return gr.mount_gradio_app(
        app,
        page.blocks(),
        path="/",
        theme=gr.themes.Default(font=fonts, font_mono=["monospace"]),
        css=views.CSS,
        footer_links=[],
        run_history=False,
        max_file_size=desk.limits.upload_bytes,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        ssr_mode=False,
    )


class Page:
    """Components by the names of the API's fields, and what happens when they are touched."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.fields: dict[str, Any] = {}
        self.start: Any = None

    def blocks(self) -> gr.Blocks:
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
            chosen, shown = gr.State(None), gr.State({})
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    make, again_from = self._form()
                with gr.Column(scale=6, min_width=320):
                    outputs, again = self._results()
            every = [chosen, shown, *outputs]
            timer = gr.Timer(TICK_SECONDS)
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
            telling = {**quiet, "queue": True, "concurrency_limit": None}  # what is said needs Gradio's queue
            timer.tick(self._refresh, [chosen, shown], every, **quiet)
            blocks.load(self._refresh, [chosen, shown], every, **quiet)
            form = [self.start, *self.fields.values()]
            for asked in (make.click, self.fields["prompt"].submit):
                made = asked(self._make, [chosen, *form], chosen, **telling)
                made.then(self._refresh, [chosen, shown], every, **quiet)
            for part in outputs[:3]:
                part.click(self._clicked, chosen, chosen, **quiet).then(self._refresh, [chosen, shown], every, **quiet)
            again.click(self._same_again, chosen, form, **telling)
            again_from.upload(self._from_record, again_from, form, **telling)
            model, adapter = self.fields["model"], self.fields["adapter"]
            hinted = [self.start, *(self.fields[name] for name in ("mode", "steps", "size", "seconds"))]
            model.input(self._of_model, model, hinted, **quiet)
            adapter.input(self._scale_of, adapter, self.fields["scale"], **quiet)
        return blocks

    # --- layout ---------------------------------------------------------------------------------------------------

    def _form(self) -> tuple[gr.Button, Any]:
        """Everything that can be asked for; gives the button, and the place for a record."""
        offer, fields = self.desk.offer, self.fields
        facts = next(iter(offer.models.values()))
        fields["prompt"] = gr.Textbox(label="Prompt", lines=4, max_lines=8, elem_id="prompt", autofocus=True,
                                      placeholder="What the video shows")  # fmt: skip
        fields["refine"] = gr.Checkbox(label="Let a language model write the prompt out", elem_id="refine",
                                       visible=offer.refines)  # fmt: skip
        self.start = gr.File(**_start(facts), elem_id="start", height=140)
        make = gr.Button("Make the video", variant="primary", elem_id="make")
        with gr.Row():
            fields["model"] = gr.Dropdown(list(offer.models), value=facts.name, label="Model",
                                          visible=len(offer.models) > 1)  # fmt: skip
            fields["mode"] = gr.Radio(**_modes(facts), label="Mode", elem_id="mode")
        with gr.Row():
            for name, hint in {"seed": "random", **_hints(facts)}.items():
                fields[name] = gr.Textbox(
                    label=name.capitalize(), elem_id=name, placeholder=hint, max_lines=1, min_width=70
                )
        with gr.Row(visible=bool(offer.adapters)):
            fields["adapter"] = gr.Dropdown([NO_ADAPTER, *offer.adapters], value=NO_ADAPTER, label="Adapter")
            fields["scale"] = gr.Number(value=1, step=0.05, label="Its scale")
        with gr.Accordion("More", open=False):
            fields["negative_prompt"] = gr.Textbox(
                label="Negative prompt", lines=2, placeholder="What to steer away from"
            )
            fields["guidance_scale"] = gr.Textbox(label="Guidance scale", placeholder="as configured", max_lines=1)
            fields["strength"] = gr.Slider(
                *STRENGTHS, value=STRENGTH, step=0.01, label="Strength: how much of a start video goes"
            )
            again_from = gr.File(label="Same again: the JSON of a clip", elem_id="record", file_types=[".json"])
        return make, again_from

    @staticmethod
    def _results() -> tuple[list[Any], gr.Button]:
        player = gr.HTML(elem_id="player", js_on_load=views.CLICKS)
        again = gr.Button("Same again", size="sm", elem_id="again")
        with gr.Accordion("Queue"):
            queue = gr.HTML(elem_id="queue", js_on_load=views.CLICKS)
        gallery = gr.HTML(elem_id="gallery", js_on_load=views.CLICKS)
        return [player, queue, gallery], again

    # --- events ---------------------------------------------------------------------------------------------------

    def _refresh(self, chosen: str | None, shown: dict[str, str]) -> list[Any]:
        """What has changed since the page was last told; a video that plays is not begun anew."""
        store, forecast = self.desk.store, self.desk.forecast()
        waiting, (recent, _) = store.waiting(), store.page(GALLERY)
        finished = [job for job in recent if job.is_finished]
        job = self._job(chosen) or next(iter([*waiting, *finished]), None)
        now = {
            "player": views.player(job, store.files(job.id) if job else None, forecast),
            "queue": views.queue(waiting, forecast),
            "gallery": views.gallery(finished, job.id if job else None),
        }
        changed = [value if shown.get(name) != value else gr.skip() for name, value in now.items()]
        return [job.id if job else None, now, *changed]

    def _job(self, chosen: str | None) -> Job | None:
        return self.desk.store.get(chosen) if chosen else None

    def _make(self, chosen: str | None, start: str | None, *values: Any) -> str | None:
        """The new job; where it is refused, the page says why and keeps everything."""
        form = dict(zip(self.fields, values))
        try:
            upload = Upload.of(Path(start).read_bytes()) if start else None
            return self.desk.take(_asked(form, upload), upload).id
        except ApiError as error:
            gr.Warning(error.message, title="Not taken")
            return chosen

    def _clicked(self, chosen: str | None, event: gr.EventData) -> str | None:
        job_id, act = str(event.job), str(event.act)
        try:
            job = self.desk.job(job_id)
        except ApiError:
            return chosen
        if act == "show":
            return job.id
        self.desk.store.delete(job.id)
        return None if job.id == chosen else chosen

    def _same_again(self, chosen: str | None) -> list[Any]:
        job = self._job(chosen)
        if job is None:
            return self._unchanged()
        start = job.request.image or job.request.video
        return self._filled(same_again(job.request), self._copy(job, start) if start else None)

    def _copy(self, job: Job, name: str) -> str | None:
        """Of the file that a job began with, in Gradio's cache, which is emptied; None where it is gone."""
        file = self.desk.store.files(job.id).folder / name
        if file.is_file():
            return str(self.start.move_resource_to_block_cache(file))
        gr.Warning("The file that the clip began with is gone; choose it again.")
        return None

    def _from_record(self, file: str | None) -> list[Any]:
        try:
            fields = read_fields(Path(file), self.desk.offer) if file else None
        except RecordError as error:
            gr.Warning(str(error), title="No such record")
            return self._unchanged()
        return self._filled(fields, None) if fields else self._unchanged()

    def _unchanged(self) -> list[Any]:
        return [gr.skip() for _ in (self.start, *self.fields)]

    def _filled(self, fields: Mapping[str, Sequence[str]], start: str | None) -> list[Any]:
        """A value for each component of the form."""
        if told := left_out(fields, start is not None):
            gr.Warning(told, title="Not quite the same")
        values: dict[str, Any] = {name: (fields.get(name) or [""])[0] for name in self.fields}
        adapter, _, scale = (fields.get("lora") or [f"{NO_ADAPTER}:1"])[0].partition(":")
        values |= {"adapter": adapter, "scale": float(scale or 1), "refine": values["refine"] == "true"}
        values["strength"] = float(values["strength"] or STRENGTH)
        facts = self.desk.offer.models.get(values["model"])
        values["model"] = values["model"] or gr.skip()
        if facts is None:  # a record names none: the one that is chosen
            values["mode"] = values["mode"] or FULL
            return [start, *values.values()]
        values["mode"] = gr.update(**_modes(facts) | {"value": values["mode"] or FULL})
        values |= {name: gr.update(value=values[name], placeholder=hint) for name, hint in _hints(facts).items()}
        return [gr.update(**_start(facts), value=start), *values.values()]

    def _of_model(self, name: str) -> list[Any]:
        facts = self.desk.offer.models[name]
        hints = (gr.update(placeholder=hint) for hint in _hints(facts).values())
        return [gr.update(**_start(facts), value=None), gr.update(**_modes(facts)), *hints]

    def _scale_of(self, adapter: str) -> Any:
        offered = self.desk.offer.adapters.get(adapter)
        return offered.scale if offered else gr.skip()


def _asked(form: Mapping[str, Any], upload: Upload | None) -> dict[str, list[str]]:
    """The form as fields of the API; what is empty is left out, and None what was never unfolded."""
    texts = {name: "" if value is None else str(value).strip() for name, value in form.items()}
    fields = {name: text for name, text in texts.items() if name not in ("adapter", "scale", "strength")}
    fields["refine"] = fields["refine"].lower()
    if upload is not None and upload.kind == "video":
        fields["strength"] = texts["strength"]
    asked = {name: [value] for name, value in fields.items() if value}
    if texts["adapter"] not in ("", NO_ADAPTER):
        asked["lora"] = [f"{texts['adapter']}:{texts['scale']}"]
    return asked


def _modes(facts: ModelFacts) -> dict[str, Any]:
    choices = [(MODES[mode], mode) for mode in facts.modes]
    return {"choices": choices, "value": facts.modes[0], "visible": len(choices) > 1}


def _start(facts: ModelFacts) -> dict[str, Any]:
    label = "Begins with this picture" if facts.start == "image" else "Starts from this video (may be left out)"
    return {"label": label, "file_types": [facts.start]}


def _hints(facts: ModelFacts) -> dict[str, str]:
    """What a model does where a field is left empty."""
    seconds = f"{(facts.num_frames - 1) / facts.fps:g}"
    return {"steps": str(facts.steps), "size": f"{facts.size[1]}x{facts.size[0]}", "seconds": seconds}
