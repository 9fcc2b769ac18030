"""The text reward: which strings a prompt quotes, how near what was read comes to them, and one real recogniser."""

from __future__ import annotations

import random
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import load_reward
from flowrl.reward_models.ocr import OCR, best_window, plain, quoted, text_score


@pytest.mark.parametrize(
    ("prompt", "strings"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ("a sign that says “OPEN” over «ici» and „hier“", ["OPEN", "ici", "hier"]),
        ("a sign 'No entry' beside \"Exit\"", ["No entry", "Exit"]),
        ("a shop with ‘Fresh Bread’ and 「パン」", ["Fresh Bread", "パン"]),
        ("the cat's toy and the dogs' bowl in the '90s and the '80s", []),
        ("it's a T-shirt with 'Don't panic' on the dog's back", ["Don't panic"]),
        ("a shirt with ‘It’s on’ on it", ["It’s on"]),
        ("he's holding a sign, isn't he", []),
        ('a 5" by 7" photo of "Rome"', ["Rome"]),
        ('nothing "" here " "', []),
        ("no quotes at all", []),
    ],
)
def test_quotes_of_all_kinds(prompt, strings):
    assert quoted(prompt) == strings


def test_case_blanks_and_kinds_of_quotes_do_not_matter():
    assert plain("Don’t\n Panic ") == plain("DON'T PANIC") == "don'tpanic"
    assert plain("ＡＢ１") == "ab1"


def levenshtein(a: str, b: str) -> int:
    """The textbook table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
    return int(table[-1, -1])


def test_best_window_is_the_best_of_all_pieces():
    """Against every piece of 300 random texts; the window given has the distance given, and no shorter one has it."""
    rng = random.Random(0)
    for _ in range(300):
        target = "".join(rng.choices("abc", k=rng.randint(1, 5)))
        text = "".join(rng.choices("abc", k=rng.randint(0, 9)))
        pieces = {text[i:j] for i in range(len(text) + 1) for j in range(i, len(text) + 1)} or {""}
        distances = {piece: levenshtein(target, piece) for piece in pieces}
        distance, start, end = best_window(target, text)
        assert distance == min(distances.values()) == distances[text[start:end]]
        assert end - start == min(len(piece) for piece, d in distances.items() if d == distance)


def test_score_by_hand():
    """abcd against abxd: 1 edit of 4, all letters in the window."""
    assert text_score(["OPEN"], ["open"]) == 1
    assert text_score(["abxd"], ["abcd"]) == pytest.approx(0.8 * 0.75 + 0.2)
    assert text_score(["O P", "EN"], ["Open"]) == 1
    assert text_score([], ["open"]) == 0 and text_score(["  "], ["open"]) == 0
    assert text_score(["zzz"], ["open"]) == 0
    # Two strings, one of which is there: half of the recall, all letters asked for.
    assert text_score(["left"], ["left", "wxyz"]) == pytest.approx(0.8 * 0.5 + 0.2)


def test_repeating_the_text_does_not_pay():
    once, often = text_score(["sale"], ["sale"]), text_score(["sale"] * 5, ["sale"])
    assert once == 1 and often == pytest.approx(0.8 + 0.2 / 5)
    assert text_score(["sale"] * 5, ["sale"], precision=0) == 1


def test_a_letter_serves_one_string():
    """Two times sale wants it twice; "a" is not found in the "ab" that another string took."""
    assert text_score(["sale"], ["sale", "sale"]) == pytest.approx(0.8 * 0.5 + 0.2)
    assert text_score(["sale", "sale"], ["sale", "sale"]) == 1
    assert text_score(["ab"], ["a", "ab"], precision=0) == 0.5
    assert text_score(["ab"], ["ab", "a"], precision=0) == 0.5


def test_score_falls_with_every_wrong_letter():
    target = "fresh bread today"
    letters, scores = list(target.replace(" ", "")), []
    for i in [0, *range(len(letters))]:
        scores.append(text_score(["".join(letters)], [target]))
        letters[i] = "#"
    assert scores[0] == 1 and all(a >= b for a, b in pairwise(scores)) and scores[-1] < 0.3


def samples(images: torch.Tensor, prompts: list[Prompt]) -> Samples:
    return Samples(prompts, list(range(len(prompts))), torch.zeros(len(prompts), dtype=torch.int64), images, images)


def read_size(picture: Image.Image) -> list[str]:
    """Reads every picture's size off."""
    return [f"{picture.width} x {picture.height}"]


def test_reward_with_an_engine_of_your_own():
    """The column overrules the quotes; who quotes nothing is not scored, nor read."""
    prompts = [
        Prompt('a sign "8x4"'),
        Prompt("no text"),
        Prompt("ignored: 'zzz'", {"text": "8 X 4"}),
        Prompt("two", {"text": ["8x4", "zzzz"]}),
        Prompt('a sign "8x4"', {"text": None}),
        Prompt("an empty one", {"text": ""}),
    ]
    images = torch.zeros(6, 3, 4, 8)
    reward = load_reward("ocr", engine=read_size)
    scores = reward(samples(images, prompts))
    assert scores.isnan().tolist() == [False, True, False, False, False, True]
    assert scores[[0, 2, 3, 4]].tolist() == pytest.approx([1, 1, 0.6, 1])
    by_path = OCR(f"{__name__}:read_size", precision=0)
    assert by_path(samples(images, prompts))[3] == 0.5


def test_options_are_checked(monkeypatch):
    with pytest.raises(ValueError, match="precision=2"):
        OCR(read_size, precision=2)
    with pytest.raises(ValueError, match="engine='tesseract'"):
        OCR("tesseract")
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "rapidocr", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'flowrl-diffusion\[ocr\]'"):
        OCR()


def test_rapidocr_reads_what_a_font_draws():
    """Right, misspelt, repeated and missing: in that order."""
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")

    def drawn(*lines: str) -> torch.Tensor:
        picture = Image.new("RGB", (256, 256), "white")
        pen = ImageDraw.Draw(picture)
        for i, line in enumerate(lines):
            pen.text((20, 20 + 56 * i), line, font=ImageFont.load_default(size=36), fill="black")
        return torch.as_tensor(np.array(picture)).permute(2, 0, 1) / 255

    pictures = torch.stack([drawn("OPEN NOW"), drawn("OPNE NAW"), drawn(*["OPEN NOW"] * 4), drawn()])
    scores = load_reward("ocr")(samples(pictures, [Prompt("a sign that says “Open now”")] * 4))
    assert scores[0] == 1 and scores[3] == 0
    assert 0.4 < scores[1] < 0.9 and scores[2] == pytest.approx(0.85)
