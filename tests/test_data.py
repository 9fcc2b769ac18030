"""Prompt files, and the order in which training sees them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from flowrl.batch import Prompt
from flowrl.data import EMBEDDED, even_order, load_prompts, prompt_order, sample_seed


def test_text_files(tmp_path):
    """One prompt per line, whatever the line ends and the byte order mark of the editor; empty lines do not count."""
    file = tmp_path / "p.txt"
    file.write_bytes("\ufeffa red circle\r\n\r\n  blaues Häuschen \n\n".encode())
    assert load_prompts(file) == [Prompt("a red circle"), Prompt("blaues Häuschen")]


def test_json_lines_carry_columns(tmp_path):
    """U+2028 may stand unescaped inside JSON text and is no line end there."""
    rows = [{"prompt": "a\u2028b", "kind": "count", "n": 3}, {"prompt": "c", "text": None}]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load_prompts(file) == [Prompt("a\u2028b", {"kind": "count", "n": 3}), Prompt("c", {"text": None})]


def test_lists_and_embedded_sets():
    assert load_prompts(["a", Prompt("b", {"k": 1})]) == [Prompt("a"), Prompt("b", {"k": 1})]
    for name in EMBEDDED:
        prompts = load_prompts(name)
        assert len({prompt.text for prompt in prompts}) == len(prompts) > 90
        assert all("include" in prompt.columns for prompt in prompts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "has no prompts in it"),
        ("p.txt", b"\n \n\n", "has no prompts in it"),
        ("p.txt", b"abc\xff", "is not UTF-8 text (byte 3)"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', "line 3: not valid JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', 'line 2: wants an object with a string "prompt"'),
        ("p.jsonl", b'{"prompt": 3}\n', 'line 1: wants an object with a string "prompt"'),
        ("p.jsonl", b'["a"]\n', 'line 1: wants an object with a string "prompt"'),
    ],
)
def test_bad_files_name_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="p.") as error:
        load_prompts(tmp_path / name)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)


def test_missing_files_and_empty_lists(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prompt file at .*nowhere.txt \(embedded sets: tiny-train"):
        load_prompts(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="no prompt file"):
        load_prompts(tmp_path)
    with pytest.raises(ValueError, match="the list of prompts is empty"):
        load_prompts([])


@pytest.mark.parametrize(("num_prompts", "count"), [(12, 4), (10, 3), (5, 5), (7, 1)])
def test_every_epoch_is_a_permutation(num_prompts, count):
    """Within an epoch no prompt comes twice; the next epoch has another order, another seed too."""
    per_epoch = num_prompts // count

    def epoch(e, seed=0):
        return [i for step in range(e * per_epoch, (e + 1) * per_epoch) for i in prompt_order(num_prompts, count, step, seed)]

    for e in range(3):
        assert len(set(epoch(e))) == len(epoch(e)) == per_epoch * count
        assert set(epoch(e)) <= set(range(num_prompts))
    assert len({tuple(epoch(e)) for e in range(20)}) > 15 or num_prompts == count == 1
    assert epoch(0) != epoch(0, seed=1)


def test_the_order_remembers_nothing():
    """Step 7's prompts are the same asked first, last or in a new process: a resumed run draws what the first drew."""
    asked_alone = prompt_order(50, 8, 7, 3)
    assert [prompt_order(50, 8, step, 3) for step in range(8)][7] == asked_alone
    assert asked_alone == [10, 39, 12, 13, 45, 11, 43, 8]
    with pytest.raises(ValueError, match="prompts_per_step=9 exceeds the 8 prompts"):
        prompt_order(8, 9, 0, 0)


def test_kinds_come_evenly():
    """30 prompts of a, 4 of b, 10 of c; 7 a step: two of each kind, and one more of each in turn. None twice in a step."""
    kinds = ["a"] * 30 + ["b"] * 4 + ["c"] * 10
    steps = [even_order(kinds, 7, step, 0) for step in range(30)]
    counts = [Counter(kinds[i] for i in order) for order in steps]
    assert all(sorted(count.values()) == [2, 2, 3] for count in counts)
    assert [max(count, key=count.get) for count in counts[:3]] == ["a", "b", "c"]
    assert all(len(set(order)) == 7 for order in steps)
    assert {i for order in steps for i in order} == set(range(44))
    assert steps[11] == even_order(kinds, 7, 11, 0) != even_order(kinds, 7, 11, 1)
    assert [Counter(kinds[i] for i in even_order(kinds, 2, step, 0)) for step in range(3)] == [
        {"a": 1, "b": 1}, {"c": 1, "a": 1}, {"b": 1, "c": 1}
    ]  # fmt: skip
    with pytest.raises(ValueError, match="prompts_per_step=13 wants 5 prompts of kind 'b' in a step; there are 4"):
        even_order(kinds, 13, 0, 0)


def test_seeds_of_neighbours_are_unrelated():
    """No collisions among 6,000 (step, prompt, generation), and the same number on every machine."""
    seeds = {sample_seed(0, step, prompt, g) for step in range(20) for prompt in range(30) for g in range(10)}
    assert len(seeds) == 6_000 and max(seeds) < 2**62
    assert sample_seed(0, 1, 2, 3) != sample_seed(0, 1, 3, 2)
    assert sample_seed(0, 1, 2, 3) == 3231852561020926448
