"""Does the picture show the text that the prompt quotes? After the OCR reward of Flow-GRPO (arXiv 2505.05470), without its gaps.

Every kind of quotation mark counts, several strings may be asked for, a letter serves one of them only, and text that nobody
asked for has its price.
"""

from __future__ import annotations

import pkgutil
import re
import unicodedata
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from flowrl.batch import Samples
from flowrl.reward_models.base import Traits, to_pil
from flowrl.reward_models.detectors import pictures_of

_PAIRS = ("“”", "„“", "„”", "«»", "»«", "「」", "『』", "``")
# A single mark opens before a word and closes after one; within a word it is an apostrophe.
_SINGLE = r"(?<!\w){open}(?=\S)((?:[^'‘’\n]|(?<=\w)['’](?=\w))+)(?<=\S){close}(?!\w)"
_QUOTED = re.compile(
    "|".join(
        [r'(?<!\d)"([^"\n]*)"']  # after a digit it means inches
        + [rf"{re.escape(pair[0])}([^{re.escape(pair)}\n]*){re.escape(pair[1])}" for pair in _PAIRS]
        + [_SINGLE.format(open="'", close="'"), _SINGLE.format(open="‘", close="’")]
    )
)
_USED = "\0"  # stands for a letter that another string has taken


def quoted(prompt: str) -> list[str]:
    """What a prompt quotes, in order: "straight", “curly”, „low“, «angle», 「corner」, 'single' and ‘single curly’ quotes."""
    return [text.strip() for match in _QUOTED.findall(prompt) for text in match if text.strip()]


def plain(text: str) -> str:
    """What is compared: without case, without blanks (recognisers lose them), with straight quotes and compatible letters."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(str.maketrans("“”„«»‘’`", '"""""\'\'\''))
    return "".join(text.split())


def best_window(target: str, text: str) -> tuple[int, int, int]:
    """Edit distance from target to the nearest piece of text, and where that piece starts and ends; the shortest among equals.

    Levenshtein's recursion with both ends of the text free (Sellers 1980). At most len(target), which an empty piece costs.
    """
    never = len(target) + 1
    row = [(0, -start) for start in range(len(text) + 1)]  # cost, -start: of equal costs the later start wins
    for i, letter in enumerate(target, 1):
        above, row = row, [(i, 0)]
        for j, other in enumerate(text, 1):
            change = never if other == _USED else int(letter != other)
            extra = never if other == _USED else 1
            row.append(
                max(
                    (above[j - 1][0] + change, above[j - 1][1]),
                    (above[j][0] + 1, above[j][1]),
                    (row[j - 1][0] + extra, row[j - 1][1]),
                    key=lambda path: (-path[0], -path[1]),
                )
            )
    end = min(range(len(row)), key=lambda j: (row[j][0], j + row[j][1]))
    return row[end][0], -row[end][1], end


def text_score(read: Sequence[str], targets: Sequence[str], precision: float = 0.2) -> float:
    """(1 - precision) x mean over targets of (1 - d / |target|) + precision x (1 - extra / |read|), in [0, 1].

    d: edit distance to the best window of what was read; letters serve one target, long targets choose first. extra: letters
    that served none. 0 where nothing was read.
    """
    text = plain("".join(read))
    if not text:
        return 0.0
    rest, total = text, 0.0
    wanted = sorted((plain(target) for target in targets), key=len, reverse=True)
    for target in wanted:
        distance, start, end = best_window(target, rest)
        rest = rest[:start] + _USED * (end - start) + rest[end:]
        total += 1 - distance / len(target)
    extra = len(text) - rest.count(_USED)
    return (1 - precision) * total / len(wanted) + precision * (1 - extra / len(text))


def rapidocr_engine() -> Callable[[Any], list[str]]:
    """A reader of PIL pictures on the CPU, with models that come inside the package. Lines from top to bottom."""
    import numpy as np
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "critical"})

    def read(picture: Any) -> list[str]:
        bgr = np.ascontiguousarray(np.asarray(picture.convert("RGB"))[:, :, ::-1])
        return list(engine(bgr).txts or ())

    return read


class OCR:
    """Is the text that the prompt quotes there, letter by letter, and no other, in [0, 1]? Abstains where it quotes nothing.

        (1 - precision) mean over quoted texts of (1 - edit distance / length) + precision (share of letters read that were asked)

    A column `text` (a string, or a list of them) says what to read instead of the quotes.
    """

    name = "ocr"
    traits = Traits(columns=("text",), range=(0, 1))

    def __init__(
        self,
        #: rapidocr, or a function from a PIL picture to its lines of text, also as "package.module:function".
        engine: Any = "rapidocr",
        precision: float = 0.2,  #: Weight of the share of letters that were asked for; 0 lets the text be repeated at no cost.
    ):
        if not 0 <= precision <= 1:
            raise ValueError(f"precision={precision} must be between 0 and 1")
        if engine == "rapidocr" and not (find_spec("rapidocr") and find_spec("onnxruntime")):
            raise ValueError("the reward ocr reads with rapidocr, which is not installed: pip install 'flowrl-diffusion[ocr]'")
        if isinstance(engine, str) and engine != "rapidocr":
            try:
                engine = pkgutil.resolve_name(engine)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"engine={engine!r}: choose rapidocr, or the path of a function ({error})") from None
        self.engine, self.precision = engine, precision

    def __call__(self, samples: Samples) -> Tensor:
        images = pictures_of(samples, self.name)
        scores = torch.full((len(samples),), torch.nan)
        for i, prompt in enumerate(samples.prompts):
            targets = self.targets(prompt.text, prompt.columns.get("text"))
            if targets:
                if self.engine == "rapidocr":
                    self.engine = rapidocr_engine()
                (picture,) = to_pil(images[i : i + 1])
                scores[i] = text_score(self.engine(picture), targets, self.precision)
        return scores

    @staticmethod
    def targets(prompt: str, column: Any = None) -> list[str]:
        """What a picture must show; without strings that have nothing to read in them."""
        strings = quoted(prompt) if column is None else [column] if isinstance(column, str) else list(column)
        return [text for text in strings if plain(text)]
