"""The watch over training: what a run's pictures and updates become, tested for drifts, and named when it looks like hacking.

Each step it measures samples that were drawn anyway: what they look like and how much they differ (`flowrl.train.appearance`),
what held-out rewards say of some of them, how long the velocity is compared with the first steps, how far the model is from its
base. A sign is a drift that is certain (`flowrl.train.trends`) and large (`flowrl.train.alarms`); signs together are an alarm: a
line, a row of alarms.jsonl, and a sheet of the start's pictures beside those that the weights of now draw from the same noise.
All processes measure together and come to the same; the first one writes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl import record
from flowrl.batch import Samples, concatenate
from flowrl.config import ConfigError, Recipe, build, unknown
from flowrl.pictures import Cell, contact_sheet
from flowrl.reward_models.base import Reward, score_one, to_pil, traits_of
from flowrl.train.alarms import ALARMS, EVALUATED, HELD_OUT, KINDS, Alarm, Sign, alarms_of, kind_of
from flowrl.train.appearance import STATISTICS, described, diversity, frames
from flowrl.train.objectives.base import check_choice, check_positive, error
from flowrl.train.predict import PolicyPredict
from flowrl.train.trends import LEVEL, Drift, Repeated, Trend

if TYPE_CHECKING:
    from flowrl.evaluate import Evaluation
    from flowrl.train.trainer import Trainer

DISTANCE = 5  #: Steps between measurements of the distance to the base, where the objective has no KL.
PROMPTS, EACH = 4, 4  #: Prompts of an alarm's sheet, and pictures of each, before and now.
SHOWN = 192  #: Pixels of their shorter side, at most.


@dataclass(frozen=True)
class Trends:
    """Test what pictures, held-out rewards and updates become for drifts, and raise alarms (docs/watch.md)."""

    #: Of an alarm: warn goes on, stop ends the run as it is, rollback ends it with the newest checkpoint from before the signs.
    action: Literal["warn", "stop", "rollback"] = "warn"
    #: Probability, over the whole run, that any series counts as drifting while nothing does.
    false_alarms: float = 0.01
    #: Factor by which edges, colours, saturation or high frequencies have to change. Brightness, dark pixels: 20 points.
    change: float = 1.5
    #: Samples of a step, over all processes, that held-out rewards score. 0 leaves them to the evaluations.
    held_out_samples: int = 32
    #: Series and alarms that are expected, as in [dark, collapse], and say nothing.
    ignore: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice(self, "action")
        if not 0 < self.false_alarms < 1:
            raise ValueError(f"false_alarms={self.false_alarms}: a probability, in (0, 1)")
        if not self.change > 1:
            raise ValueError(f"change={self.change}: a factor, above 1")
        check_positive(self, "held_out_samples", or_zero=True)
        for name in self.ignore:
            if name not in (*KINDS, *ALARMS) and not name.startswith((HELD_OUT, EVALUATED)):
                raise ConfigError(unknown("series or alarm in watch.ignore", name, [*ALARMS, *KINDS]))


@dataclass(frozen=True)
class Nothing:
    """Measure nothing."""


def _spread(known: Tensor) -> float:
    """Standard deviation of known scores (n,); NaN of fewer than two."""
    return float(known.std()) if len(known) > 1 else math.nan


#: What may stand in a recipe's `watch`.
WATCHES: dict[str, type] = {"trends": Trends, "none": Nothing}


class Watch:
    """The series of a run, and what was raised. held_out: rewards that are not trained on, by name. evaluated: names of all
    rewards that evaluations measure."""

    def __init__(self, options: Trends, held_out: Mapping[str, Reward], evaluated: Iterable[str]):
        self.options = options
        self.held_out = {
            name: reward
            for name, reward in held_out.items()
            if options.held_out_samples and traits_of(reward).arity == "point" and not traits_of(reward).remote
        }
        self.trends: dict[str, Trend] = defaultdict(Trend)
        self.evaluations: dict[str, Repeated] = {f"{EVALUATED}{name}": Repeated() for name in evaluated}
        series = len(KINDS) + len(self.held_out) + len(self.evaluations)
        self.certain = math.log(series / options.false_alarms)
        self.deviations: dict[str, list[float]] = defaultdict(list)  # of rewards, in the first steps
        self.norms: dict[str, float] = {}  # of the velocity, where each tenth of the time axis was first seen
        self.start: dict[str, Any] = {}  # rows, prompts and pictures of the first step
        self.raised: list[str] = []
        self.ending: str | None = None  # the action that ends the run
        self.since = 0
        self._file: record.Lines | None = None

    @classmethod
    def of(cls, recipe: Recipe, held_out: Mapping[str, Reward], evaluated: Iterable[str]) -> Watch | None:
        """None where nothing is watched. Raises ConfigError."""
        options = build(recipe.watch, WATCHES, "watch")
        return cls(options, held_out, evaluated if recipe.eval_steps else ()) if isinstance(options, Trends) else None

    def open(self, folder: Path, step: int) -> None:
        """Where alarms are written; those of steps that will be taken again go."""
        self._file = record.Lines(folder / "alarms.jsonl", step)

    # ------------------------------------------------------------------------------------------------ measuring

    def step(self, trainer: Trainer, batch: Samples, samples: Samples, metrics: Mapping[str, float]) -> dict[str, float]:
        """Measure one step, after its update. samples: this process's; batch: one of their batches. Returns metrics."""
        own: dict[str, float] = {}
        if samples.images is not None:
            own |= self._pictures(trainer, samples)
            if not self.start:
                self._remember(samples)
        norms = {name: value for name, value in metrics.items() if name.startswith("watch/velocity_norm/")}
        if norms:
            own["velocity"] = sum(value / self.norms.setdefault(name, value) for name, value in norms.items()) / len(norms)
        known = trainer.policy.has_lora or "reference" in trainer.policy.snapshots
        if "kl" not in metrics and known and trainer.progress.step % DISTANCE == 1:
            own["distance"] = distance(trainer, batch)
        series = {name: value for name, value in own.items() if name != "distance"}
        clipped = [value for name, value in metrics.items() if name.startswith("clip_ratio/")]
        if "reward" in metrics:
            series |= {"reward": metrics["reward"], "zero_variance": metrics["frac_reward_zero_std"]}
            self._scale("reward", metrics["reward_std"])
        if clipped:
            series["clipped"] = max(clipped)
        for name, value in series.items():
            self.trends[name].add(trainer.progress.step, value)
        return {f"watch/{name}": value for name, value in own.items()}

    def _scale(self, series: str, deviation: float) -> None:
        """The deviation that a reward's drift is measured in: of its first steps."""
        if len(self.deviations[series]) < LEVEL and math.isfinite(deviation):
            self.deviations[series].append(deviation)

    def _pictures(self, trainer: Trainer, samples: Samples) -> dict[str, float]:
        """What all processes' pictures look like, how much they differ, and what held-out rewards say of some of them."""
        assert samples.images is not None
        looks, thumbnails = described(samples.images)
        judged = torch.full((len(samples), len(self.held_out)), torch.nan)
        if self.held_out:
            count = min(len(samples), -(-self.options.held_out_samples // trainer.world))
            rows = torch.tensor([i * len(samples) // count for i in range(count)])
            some = samples.select(rows)
            judged[rows] = torch.stack([score_one(name, reward, some).cpu() for name, reward in self.held_out.items()], 1)
        widths = [len(STATISTICS), thumbnails.shape[1], len(self.held_out)]
        everything = trainer.gathered(torch.cat([looks.cpu(), thumbnails.cpu(), judged], 1))
        looks, thumbnails, judged = everything.split(widths, 1)
        within, between = diversity(thumbnails, trainer.gathered(samples.group))
        own = dict(zip(STATISTICS, looks.double().mean(0).tolist(), strict=True))
        own |= {"diversity": within, "spread": between}
        for name, values in zip(self.held_out, judged.double().T, strict=True):
            known = values[~values.isnan()]
            own[f"{HELD_OUT}{name}"] = float(known.mean())
            self._scale(f"{HELD_OUT}{name}", _spread(known))
        return own

    def evaluated(self, step: int, result: Evaluation) -> None:
        """An evaluation during training, always of the same prompts and noise."""
        for series, repeated in self.evaluations.items():
            values = result.per_prompt(series.removeprefix(EVALUATED))
            repeated.add(step, values.tolist())
            self._scale(series, _spread(values[~values.isnan()]))

    # ------------------------------------------------------------------------------------------------ judging

    def signs(self) -> dict[tuple[str, bool], Sign]:
        """The drifts that are certain and large, by series and whether it is up."""
        drifts: list[tuple[str, Drift | None]] = [
            (series, trend.drift(up)) for series, trend in self.trends.items() for up in (True, False)
        ]
        drifts += [(series, repeated.fall()) for series, repeated in self.evaluations.items()]
        signs = {}
        for series, drift in drifts:
            if drift is None or drift.evidence < self.certain or series in self.options.ignore:
                continue
            kind, scale = kind_of(series, self.options.change), self.deviations[series]
            if kind.matters(drift, sum(scale) / max(len(scale), 1)):
                signs[series, drift.up] = Sign(series, drift, kind.say(drift))
        return signs

    def judge(self, trainer: Trainer, metrics: Mapping[str, float]) -> dict[str, float]:
        """Raise the alarms of this step, each at most once in a run. Returns metrics."""
        alarms = [alarm for alarm in alarms_of(self.signs()) if alarm.name not in (*self.raised, *self.options.ignore)]
        self.raised += [alarm.name for alarm in alarms]
        if alarms and self.options.action != "warn":
            self.ending, self.since = self.options.action, min(alarm.since for alarm in alarms)
        if alarms and trainer.is_main:
            far = metrics.get("kl", metrics.get("watch/distance"))
            self._tell(trainer, alarms, "" if far is None else f"; KL to the base {far:.3g}")
        return {"watch/alarms": float(len(self.raised))}

    def _tell(self, trainer: Trainer, alarms: list[Alarm], far: str) -> None:
        """A line and a row for each alarm, and a sheet for all of a step."""
        step, sheet = trainer.progress.step, self._sheet(trainer, [alarm.text for alarm in alarms])
        for alarm in alarms:
            say(f"ALARM in step {step}: {alarm.text}{far}" + ("" if sheet is None else f" ({sheet})"))
            if self._file is not None:
                row = {"alarm": alarm.name, "text": alarm.text + far, "advice": alarm.advice, "since": alarm.since}
                row["pictures"] = None if sheet is None else str(sheet.relative_to(trainer.folder))
                row["signs"] = [{"series": sign.series, "text": sign.text, **asdict(sign.drift)} for sign in alarm.signs]
                self._file.append(step, row)

    # ------------------------------------------------------------------------------------------------ pictures

    def _remember(self, samples: Samples) -> None:
        """The pictures of the first step that a sheet will show, and their places among the step's samples."""
        rows = [i for own in samples.by_group()[:PROMPTS] for i in own[:EACH].tolist()]
        self.start = {"rows": rows, "prompts": [samples.texts[i] for i in rows], "pictures": small(samples, rows)}

    def _sheet(self, trainer: Trainer, texts: list[str]) -> Path | None:
        """The pictures of the first step, beside what the weights of now draw for the same prompts from the same noise; None
        where there were no pictures, or they cannot be drawn again."""
        if not self.start:
            return None
        drawn: list[Samples] = []
        for batch in trainer.rollout(0):
            batch.images = trainer.policy.decode(batch)
            drawn.append(batch)
            if sum(map(len, drawn)) > max(self.start["rows"]):
                break
        samples = concatenate(drawn)
        if [samples.texts[i] for i in self.start["rows"] if i < len(samples)] != self.start["prompts"]:
            return None  # a resumed run whose recipe asks for other prompts
        now = small(samples, self.start["rows"])
        prompts, step = list(dict.fromkeys(self.start["prompts"])), trainer.progress.step
        pairs = list(zip(strips(self.start["pictures"]), strips(now), strict=True))
        of = [[pair for prompt, pair in zip(self.start["prompts"], pairs, strict=True) if prompt == own] for own in prompts]
        count = max(map(len, of))
        cells = [[Cell(own[i][side] if i < len(own) else None) for side in (0, 1) for i in range(min(count, EACH))] for own in of]
        columns = [(name, "") for name in ("the first step", f"step {step}, same noise") for _ in range(min(count, EACH))]
        place = trainer.folder / "watch" / f"step-{step:06d}.png"
        place.parent.mkdir(exist_ok=True)
        with record.writing(place):
            contact_sheet(prompts, columns, cells, "; ".join(texts)).save(place)
        return place

    # ------------------------------------------------------------------------------------------------ ending

    def end(self, trainer: Trainer) -> None:
        """What `action` says, once the loop has ended for it."""
        ending = agreed(trainer, self.ending)
        if ending == "stop" and trainer.is_main:
            say(f"Stopped after step {trainer.progress.step}: watch.action=stop")
        elif ending == "rollback":
            self._roll_back(trainer)

    def _roll_back(self, trainer: Trainer) -> None:
        """Back to the newest checkpoint whose pictures were still as before; later ones are set aside under another name."""
        stopped, since = trainer.progress.step, self.since
        places = record.checkpoints(trainer.folder)
        sound = [place for place in places if step_of(place) < since - 1]
        chosen = agreed(trainer, str(sound[-1]) if sound else None)
        if chosen is None:
            if trainer.is_main:
                say(
                    f"Stopped after step {stopped}: watch.action=rollback found no checkpoint from before step {since - 1}; "
                    "lower checkpointing_steps, raise checkpoints_total_limit"
                )
            return
        trainer.restore(Path(chosen))
        trainer.accelerator.wait_for_everyone()
        if not trainer.is_main:
            return
        for place in places:
            if step_of(place) > trainer.progress.step:
                place.rename(place.with_name(f"{place.name}-rolled-back"))
        text = f"rolled back from step {stopped} to {Path(chosen).name}, from before the signs (step {since})"
        if self._file is not None:
            self._file.append(stopped, {"alarm": "rollback", "text": text, "since": since})
        say(f"{text[0].upper()}{text[1:]}. Later checkpoints are named *-rolled-back.")

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        return {
            "trends": {name: trend.state_dict() for name, trend in self.trends.items()},
            "evaluations": {name: repeated.state_dict() for name, repeated in self.evaluations.items()},
            "deviations": dict(self.deviations),
            **{name: getattr(self, name) for name in ("norms", "start", "raised")},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint holds of series that are still watched; new ones start empty."""
        for name, own in state["trends"].items():
            self.trends[name].load_state_dict(own)
        for name, own in state["evaluations"].items():
            if name in self.evaluations:
                self.evaluations[name].load_state_dict(own)
        self.deviations = defaultdict(list, {name: list(own) for name, own in state["deviations"].items()})
        self.norms, self.start, self.raised = dict(state["norms"]), dict(state["start"]), list(state["raised"])


def say(line: str) -> None:
    """A line of its own, above the progress bar."""
    from tqdm.auto import tqdm

    tqdm.write(line)


def distance(trainer: Trainer, batch: Samples) -> float:
    """Mean of (v - v_base)^2 over a few samples of a batch at one point of theirs, and over processes."""
    few = batch.select(range(min(8, max(1, len(batch) // 32))))
    predict = PolicyPredict(trainer.policy, few)
    point, _ = next(trainer.points(few))
    with torch.no_grad():
        value = error(predict(point).float(), predict.reference(point).float()).mean()
    return float(trainer.accelerator.reduce(value, "mean") if trainer.world > 1 else value)


def small(samples: Samples, rows: list[int]) -> Tensor:
    """(n, F, 3, h, w) uint8, some of the samples' pictures, or frames of their clips, at most SHOWN pixels wide or high."""
    assert samples.images is not None
    seen = frames(samples.images[rows]).float().cpu()
    scale = SHOWN / min(seen.shape[-2:])
    if scale < 1:
        size = [round(side * scale) for side in seen.shape[-2:]]
        seen = F.interpolate(seen.flatten(0, 1), size, mode="area").unflatten(0, seen.shape[:2])
    return (seen.clamp(0, 1) * 255).round().to(torch.uint8)


def strips(pictures: Tensor) -> list[Any]:
    """Pictures (n, F, 3, h, w) uint8 for a sheet, the frames of one side by side."""
    drawn = (to_pil(own.float() / 255) for own in pictures)
    return [own[0] if len(own) == 1 else record.beside(own) for own in drawn]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def agreed(trainer: Trainer, value: str | None) -> str | None:
    """What the first process says."""
    if trainer.world == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]
