"""Train the demo's text encoder from nothing: a sentencepiece tokenizer and a small T5 (v1.1), on sentences alone.

    python tools/demo/train_text.py --out WORK/t5 --seconds 60 --device cuda

writes the release's folder WORK/t5 (8 files, float16) and WORK/t5.json with the scores. The sentences come from
`tools/demo/wordings.py`, without end. Every single position of the embedding, padding too, learns to tell by a linear
map (thrown away afterwards) all that the sentence says, and two wordings of one clip learn to have the same mean: so
the video model can read it anywhere, and what it learns from some wordings holds for others.
The same --seed and --steps give the same weights on the same machine; --seconds stops wherever the time is over.

Letters: b sentences, l tokens, d width, q questions, c their choices together.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.files import SaveError, write_json
from sgm.modules.encoders.modules import EXTRA_IDS, FrozenT5Embedder
from sgm.modules.encoders.t5 import T5Config
from sgm.weights import WeightsError
from tools.demo.attributes import BACKGROUNDS, COLOURS, PATTERNS, SIZES, SPEEDS, ClipSpec, ObjectSpec
from tools.demo.captions import Said, parse
from tools.demo.wordings import (
    ALL_MOTIONS,
    FILLS,
    HELD_OUT,
    SHAPES,
    TRAINING,
    Chances,
    random_spec,
    reword,
)
from tools.random_release import config_json, piece_count, train_sentencepiece, write_text_encoder

LENGTH = 64  # tokens, as in configs/demo_infer.yaml
BY_HAND = Path(__file__).with_name("other_words.jsonl")
OF_OBJECT = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "motion": ALL_MOTIONS, "speed": SPEEDS,
             "fill": FILLS}  # fmt: skip
OF_GROUND = {"pattern": PATTERNS, "background": tuple(BACKGROUNDS), "second": ("", *BACKGROUNDS)}
QUESTIONS: dict[str, tuple] = {
    "number": (1, 2),
    **{f"{which} {name}": choices for which in ("left", "right") for name, choices in OF_OBJECT.items()},
    **OF_GROUND,
}
CHOICES = [len(choices) for choices in QUESTIONS.values()]
NOT_ASKED = -100
# At first the output is little more than each token's own embedding, whose mean already tells the words: with T5's own
# start the layers' noise hides them, and nothing is learned for hundreds of steps.
EMBEDDING_SCALE, BRANCH_SCALE = 0.5, 0.1
WITH_HELD = replace(TRAINING, caption=0.0, held=0.4)
EVERY = 25
TRIES = 50
SPREAD = 4  # positions of a sentence that are asked in a step, beside the mean of all
logger = logging.getLogger("train_text")


@dataclass(frozen=True)
class Settings:
    """What decides the weights.

    Attributes:
        steps, seconds: whichever ends first; None for no limit.
        specs: clips a step, each in two wordings.
        vocabulary, corpus: pieces of the tokenizer, and sentences that it is made from.
        sampled: share of texts that are cut into rarer pieces.
        agreement: weight of the distance between two wordings.
        held_words: share of the texts in forms kept for the test too; above 0 the "held_out" score is no test.
    """

    seed: int = 0
    steps: int | None = None
    seconds: float | None = 60
    specs: int = 64
    lr: float = 2e-3
    vocabulary: int = 1200
    corpus: int = 20_000
    sampled: float = 0.1
    agreement: float = 0.3
    held_words: float = 0.0
    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 320


@dataclass
class Record:
    """What training was like: [step, mean loss of the EVERY steps before], steps and seconds in all."""

    loss: list[list[float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0


# ---- sentences ----


def answers(objects: Sequence[ObjectSpec | Said], ground: tuple[str, str, str]) -> list[int]:
    """The right choice of each question (q entries), NOT_ASKED for a second object that is not there."""
    result = [len(objects) - 1]
    for i in range(2):
        for name, choices in OF_OBJECT.items():
            value = getattr(objects[i], name) or "still" if i < len(objects) else None
            result.append(NOT_ASKED if value is None else choices.index(value))
    return result + [choices.index(value) for choices, value in zip(OF_GROUND.values(), ground, strict=True)]


def sentences(
    seed: str, count: int, chances: Chances = TRAINING, fits: Callable[[str], bool] | None = None
) -> tuple[list[str], Tensor]:
    """Texts about random clips, and the answers (b, q). What does not fit is worded anew, at most TRIES times."""
    rng = random.Random(seed)
    texts, rows = [], []
    for _ in range(count):
        spec = random_spec(rng)
        for _ in range(TRIES):
            text = reword(spec, rng, chances)
            if fits is None or fits(text):
                break
        texts.append(text)
        rows.append(answers(spec.objects, (spec.pattern, spec.background, spec.second)))
    return texts, torch.tensor(rows)


def by_hand() -> tuple[list[str], Tensor]:
    """Sentences that people wrote, whose meaning a caption of the demo's grammar gives."""
    lines = [json.loads(line) for line in BY_HAND.read_text(encoding="utf-8").splitlines()]
    return [line["prompt"] for line in lines], torch.tensor([answers(*parse(line["caption"])) for line in lines])


class Batches(Dataset):
    """Step -> ids (b, l) and answers (b, q); rows 2i and 2i + 1 say the same. Depends on seed and step only."""

    def __init__(self, spiece: bytes, settings: Settings):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece)
        self.settings = settings

    def __len__(self) -> int:
        return self.settings.steps or 10**7

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"{self.settings.seed}/{step}")
        ids, rows = [], []
        for _ in range(self.settings.specs):
            spec = random_spec(rng)
            row = answers(spec.objects, (spec.pattern, spec.background, spec.second))
            ids += [self._text(spec, rng) for _ in range(2)]
            rows += [row, row]
        return torch.stack(ids), torch.tensor(rows)

    def _text(self, spec: ClipSpec, rng: random.Random) -> Tensor:
        """Ids (l,) of a wording that fits, now and then in rarer pieces, as slips of the pen give."""
        for _ in range(TRIES):
            chances = self._chances(rng)
            text = reword(spec, rng, chances)
            pieces = self.pieces.encode(text)
            if rng.random() < self.settings.sampled:
                pieces = [part for piece in pieces for part in self._parts(piece, rng)]
            if len(pieces) < LENGTH:
                break
        row = torch.zeros(LENGTH, dtype=torch.long)
        kept = [*pieces[: LENGTH - 1], 1]  # as FrozenT5Embedder.tokenize
        row[: len(kept)] = torch.tensor(kept)
        return row

    def _chances(self, rng: random.Random) -> Chances:
        share = self.settings.held_words
        return WITH_HELD if share and rng.random() < share else TRAINING

    def _parts(self, piece: int, rng: random.Random) -> list[int]:
        """Now and then a piece in two, each half spelled out where it is no piece itself.

        Sentencepiece has sampling of its own, but it gives other pieces in every process.
        """
        word = self.pieces.id_to_piece(piece)
        if len(word) < 3 or rng.random() >= 0.2:
            return [piece]
        cut = rng.randrange(1, len(word))
        ids = []
        for half in (word[:cut], word[cut:]):
            known = self.pieces.piece_to_id(half)
            ids += [known] if known != self.pieces.unk_id() else [self.pieces.piece_to_id(sign) for sign in half]
        return ids


# ---- the model ----


def first_bias(buckets: int, heads: int) -> Tensor:
    """T5's bias of attention by distance, (buckets, heads), to start from: heads that look back, ahead, near, anywhere.

    The first half of the buckets is for keys at or before the query, the second for keys after it, each from near to
    far. Random small ones, T5's own start, tell no order: which shape comes first is then hardly ever learned.
    """
    half = buckets // 2
    bias = torch.zeros(buckets, heads)
    bias[half:, 0::4] = -4.0
    bias[:half, 1::4] = -4.0
    bias[:, 2::4] = -0.7 * (torch.arange(buckets) % half)[:, None]
    return bias


def new_encoder(folder: Path, spiece: bytes, settings: Settings) -> FrozenT5Embedder:
    """An untrained encoder, which `folder` then holds as well: training goes through what sampling uses."""
    import transformers  # which draws the weights to start from

    config = T5Config(
        vocab_size=piece_count(spiece) + EXTRA_IDS,
        d_model=settings.width,
        d_kv=settings.width // settings.heads,
        d_ff=settings.hidden,
        num_layers=settings.layers,
        num_heads=settings.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    torch.manual_seed(settings.seed)
    model = transformers.T5EncoderModel(transformers.T5Config(**config_json(config)))
    with torch.no_grad():
        model.shared.weight.mul_(EMBEDDING_SCALE)
        for name, p in model.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                p.mul_(BRANCH_SCALE)
            if name.endswith("relative_attention_bias.weight"):
                p.copy_(first_bias(*p.shape))
    write_text_encoder(folder, config, spiece, dict(model.named_parameters()), max_length=LENGTH)
    return FrozenT5Embedder(str(folder), max_length=LENGTH, freeze=False)


def save_encoder(embedder: FrozenT5Embedder, out: Path, spiece: bytes) -> None:
    """Write the release's folder in float16, as a whole or not at all. Raises SaveError, WeightsError."""
    state = {name: p.detach().to("cpu", torch.float16) for name, p in embedder.transformer.named_parameters()}
    broken = [name for name, t in state.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise WeightsError(f"training went wrong: {broken[0]} is not finite in float16; choose a smaller --lr.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent) as temporary:
        made = Path(temporary) / out.name
        write_text_encoder(made, embedder.transformer.config, spiece, state, max_length=LENGTH)
        if out.exists():
            shutil.rmtree(out)
        made.replace(out)


class Readers(nn.Module):
    """Linear maps from an encoder's output to the answers, thrown away after training.

    `mean` reads the mean over a sentence, each value of which is first brought to the same spread: single words hardly
    move it at first. `place` reads any single position. `word` lets the position that is surest of an answer give it,
    which finds the meaning of single words long before the encoder has learned to spread it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mean = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, sum(CHOICES)))
        self.place = nn.Linear(width, sum(CHOICES))
        self.word = nn.Linear(width, sum(CHOICES))

    def read_mean(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """Logits (b, choices) of each question from embeddings (b, l, d)."""
        return self.mean(embedding.mean(1)).split(CHOICES, dim=-1)

    def loss(self, embedding: Tensor, rows: Tensor) -> Tensor:
        """Mean loss of the three readers; embeddings (b, l, d), right answers (b, q)."""
        places = torch.rand(embedding.shape[:2], device=embedding.device).topk(SPREAD).indices
        some = embedding.gather(1, places[..., None].expand(-1, -1, embedding.shape[-1]))  # (b, SPREAD, d)
        repeated = rows[:, None].expand(-1, places.shape[1], -1)
        losses = (
            question_loss(self.read_mean(embedding), rows),
            question_loss(self.place(some).split(CHOICES, dim=-1), repeated),
            question_loss(self.word(embedding).logsumexp(1).split(CHOICES, dim=-1), rows),
        )
        return sum(losses) / len(losses)


def question_loss(logits: Iterable[Tensor], rows: Tensor) -> Tensor:
    """Mean cross-entropy over questions; logits (..., choices), rows (..., q)."""
    losses = [
        F.cross_entropy(each.flatten(0, -2), rows[..., i].flatten(), ignore_index=NOT_ASKED, label_smoothing=0.02)
        for i, each in enumerate(logits)
    ]
    return torch.stack(losses).nanmean()


def disagreement(embedding: Tensor) -> Tensor:
    """How far two wordings are apart, by the spread of all. Embeddings (b, l, d); rows 2i, 2i + 1 mean one thing."""
    mean = embedding.mean(1)
    spread = mean.detach().var(0).mean().clamp_min(1e-6)
    return (mean[0::2] - mean[1::2]).square().mean() / spread


def train(embedder: FrozenT5Embedder, readers: Readers, spiece: bytes, settings: Settings, workers: int) -> Record:
    """Train both in place until the steps or the seconds are over."""
    device = embedder.device
    parameters = [*embedder.parameters(), *readers.parameters()]
    groups = [
        {"params": list(embedder.parameters()), "speed": 1.0},
        {"params": list(readers.parameters()), "speed": 3.0},
    ]
    optimizer = torch.optim.Adam(groups, lr=settings.lr, betas=(0.9, 0.98))
    loader = DataLoader(Batches(spiece, settings), batch_size=None, shuffle=False, num_workers=workers)
    torch.manual_seed(settings.seed)
    record, recent, begin = Record(), [], time.monotonic()
    embedder.train()
    readers.train()
    for step, (ids, rows) in enumerate(loader):
        record.seconds = time.monotonic() - begin
        done = max(step / (settings.steps or math.inf), record.seconds / (settings.seconds or math.inf))
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["speed"] * settings.lr * min(1, (step + 1) / 50) * (1.01 + math.cos(math.pi * done)) / 2
        embedding = embedder.transformer(ids.to(device))
        loss = readers.loss(embedding, rows.to(device))
        total = loss + settings.agreement * min(1, 2 * done) * disagreement(embedding)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        record.steps = step + 1
        recent.append(loss.detach())
        if len(recent) == EVERY:
            record.loss.append([record.steps, round(torch.stack(recent).mean().item(), 4)])
            logger.info("step %d, %.0f s, loss %.4f", record.steps, record.seconds, record.loss[-1][1])
            recent.clear()
    record.seconds = round(time.monotonic() - begin, 1)
    return record


# ---- scores ----


@torch.no_grad()
def read(embedder: FrozenT5Embedder, readers: Readers, texts: list[str]) -> Tensor:
    """The choices (b, q) that the mean of each text's embedding tells."""
    rows = []
    for start in range(0, len(texts), 256):
        logits = readers.read_mean(embedder.encode(texts[start : start + 256]).float())
        rows.append(torch.stack([each.argmax(-1) for each in logits], dim=-1))
    return torch.cat(rows).cpu()


def score(found: Tensor, rows: Tensor) -> dict[str, float]:
    """Share of right answers (b, q) per attribute, over all of them ("mean"), and of texts with no fault ("all")."""
    asked = rows != NOT_ASKED
    right = (found == rows) & asked
    result = {}
    for name in ("number", *OF_OBJECT, *OF_GROUND):
        columns = [i for i, question in enumerate(QUESTIONS) if question.split()[-1] == name]
        result[name] = float(right[:, columns].sum() / asked[:, columns].sum())
    result["mean"] = float(right.sum() / asked.sum())
    result["all"] = float((right | ~asked).all(1).float().mean())
    return {name: round(value, 4) for name, value in result.items()}


def faults(found: Tensor, rows: Tensor, texts: Sequence[str], limit: int) -> list[str]:
    """What was read wrong, for people to look at."""
    lines = []
    for text, seen, truth in zip(texts, found.tolist(), rows.tolist(), strict=True):
        wrong = [
            f"{name} {choices[s]} (not {choices[t]})"
            for (name, choices), s, t in zip(QUESTIONS.items(), seen, truth, strict=True)
            if t not in (NOT_ASKED, s)
        ]
        if wrong:
            lines.append(f"{text}: {', '.join(wrong)}")
    return lines[:limit]


def evaluate(out: Path, readers: Readers, count: int) -> dict:
    """Scores of the written folder on four kinds of texts that training did not draw, and faults in the last two.

    `count` texts of each kind, all of which fit the length, since the end of a longer one would not be seen. Each kind
    is scored by the number of shapes as well.
    """
    embedder = FrozenT5Embedder(str(out), max_length=LENGTH, device=readers.word.weight.device)
    embedder.to(torch.float32)
    readers.eval()

    def fits(text: str) -> bool:
        return not embedder.tokenize(text).truncated[0]

    sets = {
        "captions": sentences("captions", count, Chances(caption=1.0), fits),
        "wordings": sentences("wordings", count, Chances(caption=0.0), fits),
        "held_out": sentences("held out", count, HELD_OUT, fits),
        "by_hand": by_hand(),
    }
    scores, wrong = {}, {}
    for name, (texts, rows) in sets.items():
        found = read(embedder, readers, texts)
        scores[name] = score(found, rows)
        for shapes in (1, 2):
            of = rows[:, 0] == shapes - 1
            if of.any():
                scores[f"{name}, {shapes} shape{'s' if shapes > 1 else ''}"] = score(found[of], rows[of])
        if name in ("held_out", "by_hand"):
            wrong[name] = faults(found, rows, texts, 40)
    return {"scores": scores, "texts": count, "faults": wrong}


# ---- command ----


def corpus(settings: Settings) -> list[str]:
    """Lines for the tokenizer: sentences, and every common sign, so that any text can be spelled."""
    from string import ascii_lowercase, digits, punctuation

    chances = Chances(typo=0.0, unknown_verb=0.0, unknown_word=0.0)
    held = round(settings.corpus * settings.held_words)
    texts, _ = sentences(f"corpus {settings.seed}", settings.corpus - held, chances)
    if held:
        texts += sentences(f"corpus, held {settings.seed}", held, replace(chances, caption=0.0, held=0.4))[0]
    signs = " ".join(ascii_lowercase + digits + punctuation)
    return [*texts, *([signs, " ".join(ascii_lowercase), ascii_lowercase] * 50)]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the text encoder; replaced if it exists")
    parser.add_argument("--report", type=Path, help="JSON with scores and losses (OUT.json)")
    parser.add_argument("--seconds", type=float, help="stop after this time (60, if no --steps are given)")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--specs", type=int, default=64, help="clips a step, each in two wordings (64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (0.002)")
    parser.add_argument("--held-words", type=float, default=0.0, metavar="SHARE",
                        help="of the texts, in forms kept for the test too: for weights to be shipped (0)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that write sentences (0: the main one does)")
    parser.add_argument("--test-texts", type=int, default=4000, help="texts of each kind to score on (4000)")
    args = parser.parse_args(arguments)
    if args.seconds is None and args.steps is None:
        args.seconds = 60.0
    limits = [v for v in (args.seconds, args.steps) if v is not None]
    if min(*limits, args.specs, args.test_texts) <= 0 or args.seed < 0 or args.workers < 0 or not args.lr > 0:
        parser.error("--seed and --workers must not be negative, all other numbers be positive")
    if not 0 <= args.held_words <= 1:
        parser.error("--held-words must lie in 0 to 1")
    return args


def run(settings: Settings, out: Path, device: str = "cpu", workers: int = 0, test_texts: int = 4000) -> dict:
    """Train, write `out` and score it; returns the report. Raises WeightsError, SaveError."""
    spiece = train_sentencepiece(corpus(settings), settings.vocabulary, fold_case=True)
    with tempfile.TemporaryDirectory() as temporary:
        embedder = new_encoder(Path(temporary), spiece, settings).to(device)
        readers = Readers(settings.width).to(device)
        record = train(embedder, readers, spiece, settings, workers)
        save_encoder(embedder, out, spiece)
    size = sum(p.numel() for p in embedder.parameters())
    about = {"settings": asdict(settings), "device": device, "parameters": size, **asdict(record)}
    return about | evaluate(out, readers, test_texts)


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments(arguments)
    try:
        settings = Settings(args.seed, args.steps, args.seconds, args.specs, args.lr, held_words=args.held_words)
        report = run(settings, args.out, args.device, args.workers, args.test_texts)
        write_json(args.report or args.out.with_name(args.out.name + ".json"), report)
    except (WeightsError, SaveError, OSError) as error:
        print(f"train_text.py: {error}", file=sys.stderr)
        return 2
    print(f"{report['parameters']} parameters, {report['steps']} steps in {report['seconds']} s; right answers:")
    for name, row in report["scores"].items():
        print(f"{name:20}", *(f"{key} {value:.2%}" for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
