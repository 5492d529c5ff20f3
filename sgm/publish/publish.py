"""A run's adapter into a folder that is ready for the hub, and from there onto it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sgm.convert.lazy import ConvertError
from sgm.convert.lora_files import open_adapter, write_peft
from sgm.convert.output import push_to_hub, whole_folder
from sgm.files import write_text
from sgm.publish.card import Card
from sgm.publish.records import Sample, Training, read_training, run_folder, samples_in
from sgm.weights.release import locate, newest_run

_CLIPS = 4  # at most
_FOLDER = "published"  # in a run


@dataclass(frozen=True)
class Publication:
    """What to publish, and where.

    Attributes:
        source: a training run (also without its date), one of its iterations, or an adapter's file.
        repository: `OWNER/NAME` or `NAME` on the hub; None writes the folder alone.
        private: the repository is to be seen by its owner alone.
        output: folder to write; None is `published` in the run's folder.
        samples: clips to show, or folders of them; by default those of the run's newest evaluation.
        trigger: words that call the adapter up; None finds those that nearly all captions have.
        base: name on the hub of the model that it was trained on; "" is the published one of that structure.
        alpha: of the training, where the file does not say it.
        overwrite: replace an existing folder.
    """

    source: Path
    repository: str | None = None
    private: bool = False
    output: Path | None = None
    samples: Sequence[Path] = ()
    trigger: str | None = None
    base: str = ""
    alpha: float | None = None
    overwrite: bool = False


def publish(asked: Publication) -> list[str]:
    """Write the folder, upload it if a repository is named; returns the report.

    Raises:
        ConvertError, WeightsError, SaveError: what is wrong; no folder is left where it could not be written, and a
            folder that could not be uploaded stays.
    """
    source = asked.source.expanduser()
    adapter = open_adapter(source, asked.alpha)
    run = run_folder(source)
    output = asked.output or (run and run / _FOLDER)
    if output is None:
        raise ConvertError("this adapter lies in no run's folder: say where to write with --out FOLDER.")
    iteration = locate(source)[1] if source.exists() or newest_run(source) else None
    name = source.stem if source.is_file() else source.name
    training = Training(name) if run is None else read_training(run, iteration)
    samples = (samples_in(asked.samples) if asked.samples else training.samples)[:_CLIPS]
    trigger = ", ".join(training.common_words) if asked.trigger is None else asked.trigger
    inputs = {"RUN": source} | {f"--samples {sample.file}": sample.file for sample in samples}
    with whole_folder(output, overwrite=asked.overwrite, inputs=inputs) as folder:
        file = write_peft(folder, adapter, None, fold_scale=True)
        card = Card(asked.repository or output.name, adapter, training, trigger, _copied(samples, folder), asked.base)
        write_text(folder / "README.md", card.text())
    lines = [f"adapter: {adapter}, {len(adapter.modules)} linears, factor {adapter.scaling:g} in the matrices"]
    lines += [f"base: {card.base_name or 'no published model; the card says what it needs'}"]
    lines += ["note: no training_config.yaml beside it: the card says nothing of its training"] if run is None else []
    lines += ["note: no sample clips: --samples FOLDER shows what it makes"] if not samples else []
    lines += [f"written: {output} ({file.name}, README.md, {len(samples)} clips)"]
    if asked.repository:
        return [*lines, push_to_hub(output, asked.repository, private=asked.private)]
    return [*lines, f"to upload it: hf upload OWNER/NAME {output}"]


def _copied(samples: Sequence[Sample], folder: Path) -> list[tuple[str, str]]:
    """Clips under `samples/` of the folder: (path in it, prompt)."""
    if samples:
        (folder / "samples").mkdir()
    found = []
    for k, sample in enumerate(samples):
        name = f"samples/{k}.mp4"
        shutil.copyfile(sample.file, folder / name)
        found.append((name, sample.prompt))
    return found
