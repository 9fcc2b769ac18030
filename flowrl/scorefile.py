"""Scores in files: what is saved is compared, and taken as a base, without sampling again.

write_results("scores.json", [tuned, base])    # and scores.features.safetensors, where features were computed
find_results("scores.json:tiny-sd3")           # the one of that model; without a name, the only one
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from flowrl import __version__
from flowrl.batch import Prompt
from flowrl.evaluate import Evaluation
from flowrl.protocol import Protocol, digest_of
from flowrl.record import move, unfinished, write_text, writing

_NAME = re.compile(r"(.+\.json)(?::(.+))?$")


def write_results(path: str | Path, results: Sequence[Evaluation], **more: Any) -> None:
    """Scores, protocol and prompts as JSON; features, where there are any, beside it. more: further entries of the file."""
    path = Path(path)
    data = {"flowrl": __version__, **more, "results": [result.to_json() for result in results]}
    write_text(path, json.dumps(data, ensure_ascii=False, indent=1, default=str) + "\n")
    beside = {str(i): result.features for i, result in enumerate(results) if result.features is not None}
    if beside:
        from safetensors.torch import save

        with writing(features_file(path)), unfinished(path.absolute().parent) as temporary:
            (temporary / "features").write_bytes(save({name: rows.half().contiguous() for name, rows in beside.items()}))
            move(temporary / "features", features_file(path))
    else:
        features_file(path).unlink(missing_ok=True)


def features_file(path: Path) -> Path:
    return path.with_suffix(".features.safetensors")


def read_results(path: str | Path) -> list[Evaluation]:
    """What `write_results` wrote. Raises FileNotFoundError, or ValueError that names the file and the place in it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no score file at {path}; `flowrl eval MODEL --out {path}` writes one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    if not isinstance(data, dict) or not isinstance(data.get("results"), list) or not data["results"]:
        raise ValueError(f'{path} is not a score file of `flowrl eval`: it has no list "results"')
    results = [_from_json(entry, f"{path}, result {i}") for i, entry in enumerate(data["results"], 1)]
    if features_file(path).is_file():
        read_features(features_file(path), results)
    return results


def read_features(path: Path, results: Sequence[Evaluation]) -> None:
    """Give each result the features of its pictures. Raises ValueError where the file is not theirs."""
    from safetensors.torch import load_file

    try:
        for name, features in load_file(path).items():
            result = results[int(name)]
            if len(features) != len(result.prompts) * result.protocol.seeds:
                raise ValueError(f"{len(features)} pictures for result {int(name) + 1}")
            result.features = features.float()
    except (SafetensorError, ValueError, IndexError) as error:
        raise ValueError(f"{path} does not hold the features of the scores beside it ({error})") from None


def is_results(text: str) -> bool:
    """Whether a name stands for saved scores, FILE.json or FILE.json:MODEL, rather than for a model."""
    return bool(_NAME.match(text)) and not Path(text).is_dir()


def find_results(text: str) -> Evaluation:
    """The result that FILE.json or FILE.json:MODEL names. Raises as `read_results`, and where it names none, or several."""
    found = _NAME.match(text)
    assert found is not None
    path, model = found.groups()
    results = read_results(path)
    names = [result.model for result in results]
    if model is None and len(results) > 1:
        raise ValueError(f"{path} holds scores of {', '.join(names)}: say which, as {path}:{names[0]}")
    if model is not None and model not in names:
        raise ValueError(f"{path} holds no scores of {model}, but of {', '.join(names)}")
    return results[0 if model is None else names.index(model)]


def _from_json(data: Any, where: str) -> Evaluation:
    """One result. Raises ValueError with `where` and what is wrong."""
    try:
        known = {item.name for item in fields(Protocol)}
        if strange := set(data["protocol"]) - known:
            raise ValueError(f"the protocol has {', '.join(sorted(strange))}, which this version does not know")
        size = data["protocol"].get("size")
        protocol = Protocol(**{**data["protocol"], "size": tuple(size) if size else None})
        prompts = [Prompt(row["prompt"], {k: v for k, v in row.items() if k != "prompt"}) for row in data["prompts"]]
        if protocol.digest not in (None, digest_of(prompts)):
            raise ValueError(f"its prompts are not those that were scored (their digest is not {protocol.digest})")
        rows, names = data["samples"], list(data["means"])
        count, measures = protocol.seeds, dict(data["measures"])
        if len(rows) != len(prompts) * count:
            raise ValueError(f"{len(rows)} samples for {len(prompts)} prompts and {count} seeds")
        rewards = [name for name in names if name not in measures]
        for i, row in enumerate(rows):
            whole = set(row["rewards"]) == set(rewards) and isinstance(row["seed"], int)
            if not whole or row["prompt"] != prompts[i // count].text:
                wanted = ", ".join(["a seed", *rewards])
                raise ValueError(f"sample {i + 1} is not one of prompt {i // count + 1} with {wanted}")
        scores = torch.tensor([[_number(row["rewards"][name]) for name in rewards] for row in rows])
        if any(len(values) != len(prompts) for values in measures.values()):
            raise ValueError("a measure has not one value for each prompt")
        return Evaluation(
            str(data["model"]),
            protocol,
            prompts,
            [[row["seed"] for row in rows[i * count : (i + 1) * count]] for i in range(len(prompts))],
            rewards,
            scores.reshape(len(prompts), count, len(rewards)),
            measures={name: torch.tensor([_number(v) for v in values]) for name, values in measures.items()},
            weights=data.get("weights"),
            specs=dict(data.get("specs") or {}),
            summary={name: _number(value) for name, value in (data.get("summary") or {}).items()},
        )
    except KeyError as error:
        raise ValueError(f"{where}: it lacks {error}") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _number(value: Any) -> float:
    """null is NaN; anything else must be a number."""
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{value!r} is not a number")
    return float(value)
