"""What evaluations say side by side: tables for the terminal, for Markdown and for the gallery, and the numbers as JSON.

comparison = Comparison.of(base, tuned)
print(as_text(comparison.tables()))
write_text(Path("report.md"), as_markdown("demo against tiny-sd3", [str(base.protocol)], comparison.tables()))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from flowrl.evaluate import (
    DIVERSITY,
    Evaluation,
    bounds,
    check_comparable,
    compare,
    compare_wins,
    comparison_rows,
    difference_cells,
    finite,
    number,
    score_rows,
    text_table,
)
from flowrl.protocol import differences
from flowrl.statistics import Distance, distances, distances_to, interval

#: What the numbers are, for the foot of a report.
NOTE = "Intervals: 95 %, bootstrap over prompts. Same prompts and same seeds for both models; in a win rate a tie counts half."


@dataclass(frozen=True)
class Table:
    """Every row is as long as the header."""

    title: str
    header: list[str]
    rows: list[list[str]]


@dataclass
class Comparison:
    """Two evaluations by one protocol. distances: between the two; reference: of each to reference pictures, by measure."""

    base: Evaluation
    tuned: Evaluation
    rewards: list[str]
    measures: list[str] = field(default_factory=list)
    distances: dict[str, Distance] = field(default_factory=dict)
    reference: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, base: Evaluation, tuned: Evaluation, reference: Tensor | None = None) -> Comparison:
        """reference: (M, d) features of reference pictures. Raises ValueError where the two do not compare."""
        rewards = [name for name in tuned.rewards if name in base.rewards]
        if not rewards and (base.rewards or tuned.rewards):
            ours, theirs = (", ".join(result.rewards) or "none" for result in (tuned, base))
            raise ValueError(f"no reward scored both: {tuned.model} has {ours}; {base.model} has {theirs}")
        check_comparable(base, tuned, *rewards)
        comparison = cls(base, tuned, rewards)
        if found := differences(base.protocol, tuned.protocol, *DIVERSITY):
            comparison.notes.append(f"no diversity and no distances, the features differ: {found[0]}")
            return comparison
        comparison.measures = [name for name in tuned.measures if name in base.measures]
        if base.features is not None and tuned.features is not None:
            comparison.distances = distances(base.features, tuned.features, base.protocol.seeds)
            if reference is not None:
                far, near = (distances_to(features, reference) for features in (base.features, tuned.features))
                comparison.reference = {name: (far[name], near[name]) for name in far if name in near}
        return comparison

    def tables(self) -> list[Table]:
        """Each reward by kind, wins, diversity, distances, and what a benchmark of others sums up."""
        base, tuned = self.base, self.tuned
        pair = f"{tuned.model} against {base.model}"
        tables = []
        for reward in self.rewards:
            header, rows = comparison_rows(base, tuned, reward)
            if len(rows) > 2 and len({row[-1] for row in rows[:-1]}) > 1:  # kinds of one size: it is the mean of all
                rows.append(["mean of kinds", *difference_cells(compare(base, tuned, reward, by_kind=True))])
            tables.append(Table(f"{pair}: {reward}", header, rows))
        if self.rewards:
            header = ["pair by pair", "wins", "ties", "losses", "win rate", "95 % interval"]
            tables.append(Table(f"{pair}: wins", header, [self._wins(reward) for reward in self.rewards]))
        if self.measures:
            header = ["diversity", base.model, tuned.model, "difference", "95 % interval", "prompts"]
            rows = [[name, *difference_cells(compare(base, tuned, name))] for name in self.measures]
            tables.append(Table(f"{pair}: diversity within a prompt", header, rows))
        if self.distances:
            header = ["distance", f"{tuned.model} to {base.model}", "if they were equal", "p"]
            rows = [[n, *(number(v, "z.4f") for v in (d.value, d.equal)), number(d.p, ".2f")] for n, d in self.distances.items()]
            tables.append(Table(f"{pair}: distance of distributions", header, rows))
        if self.reference:
            header = ["distance to the reference", base.model, tuned.model, "difference"]
            rows = [[n, number(a, "z.4f"), number(b, "z.4f"), number(b - a, "+z.4f")] for n, (a, b) in self.reference.items()]
            tables.append(Table(f"{pair}: distance to the reference pictures", header, rows))
        shared = [name for name in tuned.summary if name in base.summary]
        if shared:
            pairs = [(name, base.summary[name], tuned.summary[name]) for name in shared]
            rows = [[name, number(a), number(b), number(b - a, "+z.3f")] for name, a, b in pairs]
            tables.append(Table(f"{pair}: as the benchmark sums up", ["summary", base.model, tuned.model, "difference"], rows))
        return tables

    def _wins(self, reward: str) -> list[str]:
        w = compare_wins(self.base, self.tuned, reward)
        return [reward, *(number(v) for v in (w.wins, w.ties, w.losses, w.rate)), bounds(w.low, w.high)]

    def to_json(self) -> dict[str, Any]:
        """The numbers of the tables, wins of every kind too."""
        base, tuned = self.base, self.tuned
        rewards = {
            reward: {
                kind or "all": {
                    **_plain(vars(compare(base, tuned, reward, kind))),
                    "win_rate": _plain({**vars(w := compare_wins(base, tuned, reward, kind)), "rate": w.rate}),
                }
                for kind in [None, *base.kinds]
            }
            for reward in self.rewards
        }
        return {
            "base": base.model,
            "tuned": tuned.model,
            "rewards": rewards,
            "diversity": {name: _plain(vars(compare(base, tuned, name))) for name in self.measures},
            "distances": {name: _plain(asdict(d)) for name, d in self.distances.items()},
            "reference": {name: _plain({"base": a, "tuned": b}) for name, (a, b) in self.reference.items()},
        }


def _plain(values: dict[str, float]) -> dict[str, float | None]:
    return {name: finite(value) for name, value in values.items()}


def score_tables(results: Sequence[Evaluation]) -> list[Table]:
    """Models without a base: all of them in one table where they are several, then each by kind, with its intervals."""
    tables = []
    if len(results) > 1:
        names = list(dict.fromkeys(name for result in results for name in result.rewards))
        rows = [[r.model, *(number(r.mean(n)) if n in r.rewards else "-" for n in names)] for r in results]
        tables.append(Table("mean over all prompts", ["model", *names], rows))
    for result in results:
        if result.rewards:
            tables.append(Table(result.model, *score_rows(result)))
        names = [*result.rewards, *result.measures]
        rows = []
        for name in names:
            values = result.per_prompt(name)
            known = values[~values.isnan()].double().numpy()
            rows.append([name, number(result.mean(name)), bounds(*interval(known)), str(len(known))])
        if rows:
            tables.append(Table(f"{result.model}: intervals", ["mean", result.model, "95 % interval", "prompts"], rows))
        if result.summary:
            rows = [[name, number(value)] for name, value in result.summary.items()]
            tables.append(Table(f"{result.model}: as the benchmark sums up", ["summary", result.model], rows))
    return tables


def as_text(tables: Sequence[Table]) -> str:
    """For a terminal: one below the other; the first word of each header says what it is."""
    return "\n\n".join(text_table(table.header, table.rows) for table in tables)


def as_markdown(title: str, facts: Sequence[str], tables: Sequence[Table], note: str = "") -> str:
    """For a report or a pull request. facts: paragraphs below the title; note: at the foot."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    parts = [f"# {title}", *facts]
    for table in tables:
        rule = "|---" + "|---:" * (len(table.header) - 1) + "|"
        parts += [f"## {table.title}", "\n".join([line(table.header), rule, *map(line, table.rows)])]
    return "\n\n".join([*parts, *([note] if note else [])]) + "\n"
