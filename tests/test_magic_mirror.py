"""MagicMirror: the taxonomy, the assessor's answers and rewards worked by hand, the report."""

import pytest

from flowrl.reward_models.magic_mirror import (
    COSTS,
    SUB_WORDS,
    TAXONOMY,
    WORDS,
    Assessment,
    assessor_reward,
    cleanliness,
    parse,
    report,
)
from flowrl.tiny.corrupt import LABELS

HAND = Assessment.of("human/hand", "object")


def answer(box: str, thought: str = "The hand has {six} fingers.") -> str:
    return f"<think>{thought}</think> So: \\boxed{{{box}}}"


def test_the_taxonomy_has_the_papers_size_and_words():
    assert {kind: len(subs) for kind, subs in TAXONOMY.items()} == {
        "attributes": 4,
        "interaction": 3,
        "human": 7,
        "animal": 3,
        "object": 0,
        "other": 0,
    }
    assert set(WORDS) == set(TAXONOMY) == set(COSTS)
    assert set(SUB_WORDS) == {(kind, sub) for kind, subs in TAXONOMY.items() for sub in subs}
    for kind, sub in LABELS.values():
        assert Assessment.of(kind if sub is None else f"{kind}/{sub}").artifacts


@pytest.mark.parametrize(
    "truth", [Assessment(), HAND, Assessment.of("attributes/color", "attributes/texture", "other"), Assessment.of("animal")]
)
def test_answers_survive_writing_and_reading(truth):
    assert parse(answer(truth.json)) == truth
    assert parse(answer("\n  " + truth.json + "\n")) == truth


def test_nested_braces_in_the_box_are_read_whole():
    """A search for the first closing brace, as in released code, cuts the object after its inner one."""
    box = '{"Whether Normal": false, "Type of Abnormality": {"L2: Abnormal Object Morphology": true}}'
    assert parse(answer(box)) == Assessment.of("object")


@pytest.mark.parametrize(
    "text",
    [
        '\\boxed{{"Whether Normal": true}}',  # no thought
        "<think>fine</think> normal",  # no box
        '<think>\\boxed{{"Whether Normal": true}}</think>',  # the box inside the thought
        answer('{"Whether Normal": "yes"}'),
        answer('{"Whether Normal": true, "Type of Deformity": {}}'),
        answer('{"Whether Normal": false}'),
        answer('{"Whether Normal": false, "Type of Deformity": {}}'),  # wrong, but nothing is
        answer('{"Whether Normal": false, "Type of Deformity": {"L2: Ugly": true}}'),
        answer('{"Whether Normal": false, "Type of Deformity": {"L2: Abnormal Human Anatomy": true}}'),
        answer('{"Whether Normal": false, "Type of Deformity": {"L2: Abnormal Human Anatomy": ["L3: Abnormal Head Structure"]}}'),
        answer('{"Whether Normal": false, "Type of Deformity": ["L2: Abnormal Object Morphology"]}'),
        answer("{'Whether Normal': True}"),
        answer("[]"),
        "<think>x</think>\\boxed{" + '{"Whether Normal": true}',  # the box is not closed
    ],
)
def test_other_formats_are_refused(text):
    assert parse(text) is None
    assert assessor_reward(text, Assessment())["total"] == 0


@pytest.mark.parametrize(
    ("said", "truth", "total"),
    [
        (Assessment(), Assessment(), 12),  # 8 + 4; there are no labels to earn with
        (Assessment(), HAND, 8),  # wrong verdict
        (HAND, Assessment(), 8),
        (HAND, HAND, 15),  # 8 + 4 + 2 + 1
        (Assessment.of("object"), Assessment.of("object"), 14),  # no sub-kinds: 8 + 4 + 2
        (Assessment.of("object"), HAND, 12.6),  # kinds .6 - .3 = .3: 12 + 2 x .3
        (Assessment.of("human/hand"), HAND, 13.6),  # kinds .3, sub-kinds of the common kind right: 12 + .6 + 1
        (Assessment.of("human/foot", "object"), HAND, 14),  # kinds 1; sub-kinds 0 - .3 - .3 -> 0
        (Assessment.of("human/hand", "human/foot", "object"), HAND, 14.3),  # sub-kinds .6 - .3
        (Assessment.of("human/hand", "attributes/color", "other"), HAND, 12),  # kinds .6 - 3 x .3 -> 0, so no sub-kinds either
        (Assessment.of("attributes/color"), HAND, 12),
        (Assessment.of("human/hand", "object", "other"), HAND, 14.8),  # kinds 1.2 - .3 = .9: 12 + 1.8 + 1
    ],
)
def test_assessor_reward_by_hand(said, truth, total):
    assert assessor_reward(answer(said.json), truth)["total"] == pytest.approx(total)
    assert assessor_reward(answer(said.json), truth, consistent=False)["total"] == 0


def test_cleanliness_by_hand():
    """Costs 1, 1, 1, .7, .5, .3 sum to 4.5."""
    assert cleanliness(Assessment()) == 1
    assert cleanliness(HAND) == pytest.approx(1 - 2 / 4.5)
    assert cleanliness(Assessment.of("attributes/color", "attributes/detail")) == pytest.approx(1 - 0.5 / 4.5)
    assert cleanliness(Assessment.of(*TAXONOMY)) == pytest.approx(0)
    assert cleanliness(Assessment.of("other"), {**dict.fromkeys(TAXONOMY, 0.0), "human": 1.0}) == 1


def test_report_counts_levels_unreadable_answers_and_missing_subjects():
    found = [Assessment(), HAND, Assessment.of("attributes/color"), None, Assessment(), None]
    result = report(found, missing=[None, None, None, None, "animal", "object"])
    assert (result.count, result.valid) == (6, 5)
    assert result.rates["artifact"] == pytest.approx(4 / 5)
    assert result.rates["object"] == pytest.approx(2 / 5)
    assert result.rates["human/hand"] == result.rates["animal"] == pytest.approx(1 / 5)
    assert result.score == pytest.approx(20)
    assert result.scores()["object"] == pytest.approx(60)
    assert result.as_dict()["rates"]["attributes/color"] == pytest.approx(1 / 5)
    table = result.table()
    assert "| · hand | 1 | 20.0 % |" in table and "· foot" not in table and "5 of 6 pictures" in table
    with pytest.raises(ValueError, match="none of the 1"):
        report([None])


def test_unknown_labels_are_named():
    with pytest.raises(ValueError, match="unknown kind of artifact 'ugly'"):
        Assessment.of("ugly")
    with pytest.raises(ValueError, match="no sub-kinds of 'animal'"):
        Assessment.of("animal/hand")
