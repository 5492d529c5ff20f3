"""The model card of a published adapter: what it is for, what it was made of, and how to use it with three programs."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

import sgm
from sgm.convert.lora_files import FILE, StoredAdapter
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.publish.records import Training
from sgm.weights.identify import Published

PROMPT = "a caption like those of the clips"
_COMFY_FOLDER = "ComfyUI/models/CogVideo/loras"


@dataclass(frozen=True)
class Card:
    """What a card is written from.

    Attributes:
        repository: the name that its commands use, `OWNER/NAME` or a folder.
        trigger: words that a prompt should have; "" where none are known.
        clips: (file in the repository, prompt) of each sample.
        given_base: the base's name on the hub; "": that of the published model that it fits.
    """

    repository: str
    adapter: StoredAdapter
    training: Training
    trigger: str
    clips: list[tuple[str, str]]
    given_base: str = ""

    @property
    def base_name(self) -> str:
        """The base's name on the hub; "" where there is none."""
        return self.given_base or (self.base.repository if self.base else "")

    @property
    def base(self) -> Published | None:
        """The published model whose structure it fits."""
        sizes = self.training.sizes
        return sizes.nearest if sizes is not None and sizes.is_published else None

    @property
    def takes_image(self) -> bool:
        return self.training.sizes is not None and self.training.sizes.takes_image

    @property
    def few_steps(self) -> FewSteps | None:
        return FewSteps.parse(self.adapter.few_steps) if self.adapter.few_steps else None

    @property
    def prompt(self) -> str:
        """One that suits it."""
        return next((text for _, text in self.clips if text), next(iter(self.training.examples), PROMPT))

    def text(self) -> str:
        """README.md, with the header that the hub reads."""
        title = f"# {self.training.name}\n\n{self._about()}"
        header = yaml.safe_dump(self._header(), sort_keys=False, allow_unicode=True)
        parts = [f"---\n{header}---", title, self._prompts(), self._clips(), self._ours(), self._diffusers()]
        parts += [self._comfyui(), self._table()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _header(self) -> dict[str, Any]:
        kind = "image-to-video" if self.takes_image else "text-to-video"
        header: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": kind}
        if self.base_name:
            header |= {"base_model": self.base_name, "base_model_relation": "adapter"}
        header["tags"] = ["lora", "cogvideox", "template:diffusion-lora", kind]
        if self.trigger:
            header["instance_prompt"] = self.trigger
        if self.clips:
            header["widget"] = [{"text": prompt or "-", "output": {"url": file}} for file, prompt in self.clips]
        return header

    def _about(self) -> str:
        name = self.base_name
        sizes = self.training.sizes
        other = "a CogVideoX model" if sizes is None else f"a {sizes.name}"
        base = f"[{name}](https://huggingface.co/{name})" if name else other
        text = f"A LoRA adapter for {base}, trained with cogvideox-sat {sgm.__version__}."
        if few := self.few_steps:
            guidance = "" if few.guidance else " and no guidance"
            text += f" It was distilled to need {few.steps} steps ({few.sampler}){guidance}."
        return text

    def _prompts(self) -> str:
        lines = ["## Prompts"]
        lines += [f"Words that call it up: **{self.trigger}**."] if self.trigger else []
        if self.training.examples:
            shown = "\n".join(f"- {text}" for text in self.training.examples)
            lines.append(f"Captions that it was trained with:\n\n{shown}")
        return "\n\n".join(lines) if len(lines) > 1 else ""

    def _clips(self) -> str:
        if not self.clips:
            return ""
        clips = "\n".join(f"- [{file}]({file}){f': {prompt}' if prompt else ''}" for file, prompt in self.clips)
        return f"## Samples\n\n{clips}"

    def _ours(self) -> str:
        config = f"configs/{self.base.config}_infer.yaml" if self.base else "CONFIG.yaml"
        image = " --image PICTURE" if self.takes_image else ""
        command = f"python sample_video.py {config} --lora {self.repository} --prompt {shlex.quote(self.prompt)}{image}"
        return f"## cogvideox-sat\n\n```shell\n{command}\n```"

    def _diffusers(self) -> str:
        kind = "CogVideoXImageToVideoPipeline" if self.takes_image else "CogVideoXPipeline"
        base = self.base_name or "FOLDER"
        dtype = "float16" if self.base and not self.base.rotary else "bfloat16"
        training, few = self.training, self.few_steps
        asked = [f"prompt={json.dumps(self.prompt, ensure_ascii=False)}"]
        asked += ['image=load_image("picture.png")'] if self.takes_image else []
        asked += [f"num_frames={training.frames}"] if training.frames else []
        asked += [f"height={training.size[0]}, width={training.size[1]}"] if training.size else []
        asked += [f"num_inference_steps={few.steps}"] if few else []
        asked += ["guidance_scale=1"] if few and not few.guidance else ["guidance_scale=6, use_dynamic_cfg=True"]
        loaded = "export_to_video, load_image" if self.takes_image else "export_to_video"
        code = [
            "import torch", f"from diffusers import CogVideoXDPMScheduler, {kind}",
            f"from diffusers.utils import {loaded}", "",
            f'pipe = {kind}.from_pretrained("{base}", torch_dtype=torch.{dtype}).to("cuda")',
            'pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")',
            f'pipe.load_lora_weights("{self.repository}")',
            f"video = pipe({', '.join(asked)}).frames[0]",
            f'export_to_video(video, "out.mp4", fps={round(training.fps or 8)})',
        ]  # fmt: skip
        notes = ["The factor alpha / r is in the matrices: the scale is 1."]
        notes += ["diffusers has no schedule for its few steps; there it is sampled with the base's."] if few else []
        if not self.base_name:
            notes.append("FOLDER is the base in diffusers' form (`tools/convert_weight_sat2hf.py` of cogvideox-sat).")
        return "## diffusers\n\n```python\n" + "\n".join(code) + "\n```\n\n" + " ".join(notes)

    def _comfyui(self) -> str:
        if not self.base:
            return ""
        return (
            f"## ComfyUI\n\nWith [ComfyUI-CogVideoXWrapper](https://github.com/kijai/ComfyUI-CogVideoXWrapper): put "
            f"`{FILE}` into `{_COMFY_FOLDER}` and choose it in the node *CogVideo LoraSelect*, strength 1, wired to "
            "the `lora` input of the node that loads the model."
        )

    def _table(self) -> str:
        ranks = f"{self.adapter.rank}, {self.adapter.alpha:g} in training; in the file alpha = rank, factor 1"
        modules = (name.partition("transformer_blocks.")[2].partition(".")[2] or name for name in self.adapter.modules)
        own = [("rank, alpha", ranks), ("adapts", ", ".join(dict.fromkeys(modules)))]
        rows = "\n".join(f"| {what} | {how_much} |" for what, how_much in [*own, *self.training.facts])
        return f"## Training\n\n| | |\n|---|---|\n{rows}"
