"""Saved scores: they come back as they were, broken ones are named, and what two evaluations say side by side."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from flowrl.batch import Prompt
from flowrl.comparison import NOTE, Comparison, as_markdown, as_text, score_tables
from flowrl.evaluate import Evaluation, Protocol, compare, compare_wins, with_diversity
from flowrl.protocol import digest_of
from flowrl.scorefile import features_file, find_results, is_results, read_results, write_results

PROMPTS = [
    Prompt("a | b", {"kind": "one", "box": [1, 2]}),
    Prompt("blue", {"kind": "two"}),
    Prompt("ein Kreis \u00e4", {"kind": "two"}),
]
PROTOCOL = Protocol("three", 20, 1.5, seeds=2, digest=digest_of(PROMPTS), size=(64, 64), dtype="float32", ema=True)


def made(shift: float = 0.0, name: str = "base", features: bool = True) -> Evaluation:
    """Two rewards; the second abstains on the second prompt."""
    scores = torch.tensor([[[0.0, 1.0], [0.5, 2.0]], [[1.0, math.nan], [1.0, math.nan]], [[0.25, 3.0], [0.75, 4.0]]])
    seeds = [[11, 12], [21, 22], [(1 << 62) - 1, 32]]
    rewards = {"r": "v1", "s": "v1"}
    result = Evaluation(name, replace(PROTOCOL, rewards=rewards), PROMPTS, seeds, ["r", "s"], scores + shift, weights="w0")
    result.specs = {"r": "mine.r", "s": "mine.s"}
    if features:
        x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) + shift
        result = with_diversity(result, x, "f1")
    return result


def test_what_is_written_comes_back(tmp_path):
    """Scores to six decimals, NaN as NaN, seeds beyond 2^53, columns, umlauts; features to half precision."""
    base, tuned = made(), made(0.125, "tuned")
    base.summary = {"overall": 0.5}
    file = tmp_path / "deep.er" / "scores.json"
    write_results(file, [base, tuned], comparisons=[])
    first, second = read_results(file)
    for ours, theirs in ((base, first), (tuned, second)):
        assert (theirs.model, theirs.protocol, theirs.prompts, theirs.seeds) == (
            ours.model,
            ours.protocol,
            ours.prompts,
            ours.seeds,
        )
        assert torch.allclose(theirs.scores, ours.scores, equal_nan=True) and theirs.rewards == ours.rewards
        assert torch.allclose(theirs.features, ours.features, atol=2e-3) and theirs.specs == ours.specs
        assert theirs.measures.keys() == ours.measures.keys() == {"pairwise_distance", "vendi_score"}
        assert all(torch.allclose(theirs.measures[n].double(), ours.measures[n], atol=1e-6) for n in ours.measures)
    assert first.summary == {"overall": 0.5} and first.weights == "w0"
    assert compare(first, second, "r").value == pytest.approx(0.125) and compare(first, tuned, "r").low == pytest.approx(0.125)


def test_features_of_an_earlier_file_do_not_stay(tmp_path):
    file = tmp_path / "scores.json"
    write_results(file, [made()])
    assert features_file(file).is_file()
    write_results(file, [made(features=False)])
    assert not features_file(file).exists() and read_results(file)[0].features is None


def test_a_name_says_which_result(tmp_path):
    file = tmp_path / "scores.json"
    write_results(file, [made(), made(0.1, "runs/a")])
    assert find_results(f"{file}:runs/a").model == "runs/a"
    with pytest.raises(ValueError, match=r"holds scores of base, runs/a: say which, as .*scores\.json:base"):
        find_results(str(file))
    with pytest.raises(ValueError, match=r"holds no scores of b, but of base, runs/a"):
        find_results(f"{file}:b")
    assert is_results("x.json") and is_results("x.json:a") and not is_results("x") and not is_results(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [], 'not a score file of `flowrl eval`: it has no list "results"'),
        (lambda d: {"results": []}, "not a score file"),
        (lambda d: d["results"][0].pop("protocol"), "result 1: it lacks 'protocol'"),
        (lambda d: d["results"][0].pop("prompts"), "result 1: it lacks 'prompts'"),
        (lambda d: d["results"][0]["protocol"].update(sampler="x"), "the protocol has sampler, which this version does not know"),
        (lambda d: d["results"][0]["samples"].pop(), "5 samples for 3 prompts and 2 seeds"),
        (lambda d: d["results"][0]["samples"][4]["rewards"].pop("r"), "sample 5 is not one of prompt 3 with a seed, r, s"),
        (lambda d: d["results"][0]["samples"][2].update(prompt="x"), "sample 3 is not one of prompt 2"),
        (lambda d: d["results"][0]["samples"][0]["rewards"].update(r="0.5"), "'0.5' is not a number"),
        (lambda d: d["results"][0]["samples"][0].update(seed=None), "sample 1 is not one of prompt 1"),
        (lambda d: d["results"][0]["measures"].update(vendi_score=[1.0]), "a measure has not one value for each prompt"),
        (lambda d: d["results"][0]["prompts"][1].update(kind="three"), "its prompts are not those that were scored"),
        (lambda d: d["results"][0].update(samples=7), "result 1: "),
    ],
)
def test_a_broken_file_is_named_with_the_place(tmp_path, change, message):
    file = tmp_path / "scores.json"
    write_results(file, [made()])
    data = json.loads(file.read_text())
    other = change(data)
    file.write_text(json.dumps(other if other in ([], {"results": []}) else data))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_results(file)
    assert str(file) in str(caught.value)


def test_files_that_are_no_scores(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no score file at .*a\.json; `flowrl eval MODEL --out"):
        read_results(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"results": [')
    with pytest.raises(ValueError, match=r"a\.json is not JSON .*line 1"):
        read_results(tmp_path / "a.json")
    write_results(tmp_path / "b.json", [made()])
    features_file(tmp_path / "b.json").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.features\.safetensors does not hold the features of the scores beside it"):
        read_results(tmp_path / "b.json")


# ------------------------------------------------------------------------------------------------ side by side


def test_tables_of_a_comparison():
    """Tuned is 0.125 above base everywhere: it wins every pair, and the difference never varies. s abstains on prompt 2."""
    comparison = Comparison.of(made(), made(0.125, "tuned"))
    by_title = {table.title.removeprefix("tuned against base: "): table for table in comparison.tables()}
    r, s, wins, diversity, distance = (by_title[name] for name in by_title)
    assert r.header == ["r", "base", "tuned", "difference", "95 % interval", "prompts"]
    assert r.rows[0] == ["one", "0.250", "0.375", "+0.125", "-", "1"]  # of one prompt there is no interval
    assert r.rows[2] == ["all", "0.583", "0.708", "+0.125", "+0.125 to +0.125", "3"]
    assert r.rows[3][:4] == ["mean of kinds", "0.500", "0.625", "+0.125"]  # (0.25 + (1 + 0.5) / 2) / 2
    assert [row[0] for row in s.rows] == ["one", "two", "all"] and s.rows[2] == [
        "all",
        "2.500",
        "2.625",
        "+0.125",
        "+0.125 to +0.125",
        "2",
    ]
    assert wins.rows == [[n, "1.000", "0.000", "0.000", "1.000", "1.000 to 1.000"] for n in "rs"]
    assert [row[0] for row in diversity.rows] == ["pairwise_distance", "vendi_score"] and len(distance.rows) == 2
    assert all(len(row) == len(table.header) for table in comparison.tables() for row in table.rows)


def test_other_features_leave_diversity_out_and_say_so():
    tuned = with_diversity(made(0.1, "tuned", features=False), torch.randn(6, 5), "f2")
    comparison = Comparison.of(made(), tuned)
    assert comparison.measures == [] and comparison.distances == {}
    assert comparison.notes == [
        "no diversity and no distances, the features differ: reward pairwise_distance: version f1 against f2"
    ]


def test_what_does_not_compare_is_refused():
    with pytest.raises(ValueError, match=r"base and tuned: their protocols differ in seed: 0 against 1"):
        tuned = made(name="tuned")
        Comparison.of(made(), replace(tuned, protocol=replace(tuned.protocol, seed=1)))
    with pytest.raises(ValueError, match=r"reward r: version v1 against v2"):
        Comparison.of(made(), replace(tuned, protocol=replace(tuned.protocol, rewards={"r": "v2"})))
    with pytest.raises(ValueError, match="no reward scored both: tuned has q, s2; base has r, s"):
        Comparison.of(made(), replace(tuned, rewards=["q", "s2"]))


def test_reference_pictures():
    """The base's features stand where the reference is; the tuned model's are one away in each of 5 dimensions: 5 more."""
    base, tuned = made(), made(1.0, "tuned")
    rows = Comparison.of(base, tuned, reference=base.features).reference
    assert rows["frechet"][0] == pytest.approx(0.0, abs=1e-6) and rows["frechet"][1] == pytest.approx(5.0, abs=1e-4)
    assert rows["mmd"][0] < rows["mmd"][1]


def test_json_of_a_comparison_is_json():
    facts = json.loads(json.dumps(Comparison.of(made(), made(0.125, "tuned")).to_json(), allow_nan=False))
    everything = facts["rewards"]["s"]["all"]
    assert everything["base"] == 2.5 and everything["low"] == 0.125 and everything["win_rate"]["rate"] == 1.0
    assert facts["rewards"]["s"]["two"]["prompts"] == 1 and facts["rewards"]["s"]["two"]["low"] is None
    assert set(facts["distances"]) == {"frechet", "mmd"} and facts["diversity"]["vendi_score"]["prompts"] == 3


def test_wins_by_kind():
    """Prompt 1 alone: base 0 and 0.5, tuned 0.5 and 0.5: one win, one tie."""
    base, tuned = made(), made(name="tuned")
    tuned.scores = base.scores.clone()
    tuned.scores[0, 0, 0] = 0.5
    w = compare_wins(base, tuned, "r", "one")
    assert (w.wins, w.ties, w.rate) == (0.5, 0.5, 0.75) and compare_wins(base, tuned, "r").rate == pytest.approx(0.75 / 3 + 1 / 3)


def test_markdown_is_a_table_whatever_the_names_are():
    tables = Comparison.of(made(name="a|b"), made(0.125, "tuned")).tables()
    text = as_markdown("tuned against base", ["3 prompts"], tables, NOTE)
    assert text.startswith("# tuned against base\n\n3 prompts\n\n## tuned against a|b: r\n\n| r | a\\|b | tuned |")
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == sum(len(table.rows) + 2 for table in tables) and lines[1] == "|---|---:|---:|---:|---:|---:|"
    assert text.endswith("counts half.\n") and as_text(tables).count("\n\n") == len(tables) - 1


def test_models_without_a_base():
    """All in one table, then each with intervals; a model without a reward has a dash."""
    other = made(0.5, "other", features=False)
    other.rewards, other.scores = ["r"], other.scores[:, :, :1]
    tables = score_tables([made(), other])
    assert tables[0].rows == [["base", "0.583", "2.500"], ["other", "1.083", "-"]]
    assert [table.title for table in tables[1:]] == ["base", "base: intervals", "other", "other: intervals"]
    assert tables[2].rows[1][:2] == ["s", "2.500"] and tables[2].rows[1][3] == "2"
    assert len(tables[2].rows) == 4 and len(tables[4].rows) == 1
