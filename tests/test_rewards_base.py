"""What a scorer may be, and what happens when it breaks its contract."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.cli import main
from flowrl.commands.rewards import option_comments
from flowrl.config import ConfigError, load_recipe
from flowrl.policy import Policy
from flowrl.reward_models import EMBEDDED, REWARDS, Traits
from flowrl.reward_models.base import (
    FunctionReward,
    RewardError,
    as_scores,
    find_reward,
    load_reward,
    load_rewards,
    score,
)
from flowrl.train.trainer import Trainer


def samples(n: int = 3, *columns: dict, frames: int | None = None) -> Samples:
    shape = (n, 3, 4, 4) if frames is None else (n, frames, 3, 4, 4)
    images = torch.linspace(0, 1, n).reshape(n, *[1] * (len(shape) - 1)).expand(shape)
    prompts = [Prompt(f"prompt {i}", columns[i] if columns else {}) for i in range(n)]
    return Samples(prompts, list(range(n)), torch.zeros(n, dtype=torch.int64), images, images)


@pytest.mark.parametrize(
    "values",
    [[0, 0.5, 1], (0, 0.5, True), np.array([0, 0.5, 1]), torch.tensor([0, 0.5, 1]), iter([0, 0.5, 1])],
)
def test_any_sequence_of_numbers_is_a_score(values):
    scores = as_scores(values, 3, "r")
    assert torch.equal(scores, torch.tensor([0.0, 0.5, 1.0])) and scores.dtype == torch.float32


def test_none_abstains():
    assert as_scores([1, None, 2], 3, "r").isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0, 2.0], r"reward 'r' returned values of shape \(2,\) for 3 samples"),
        (torch.zeros(3, 1), r"reward 'r' returned values of shape \(3, 1\) for 3 samples"),
        (0.5, "reward 'r' returned float instead of one number"),
        (None, "reward 'r' returned NoneType instead of one number"),
        (["good", "bad", "ugly"], "reward 'r' returned list instead of one number"),
        ({"scores": [1, 2, 3]}, "reward 'r' returned dict instead of one number"),
        ([0.0, float("inf"), 1.0], "reward 'r' returned infinity for sample 1"),
    ],
)
def test_broken_answers_name_the_reward(values, message):
    with pytest.raises(RewardError, match=message):
        as_scores(values, 3, "r")


def test_a_function_gets_the_columns_that_it_names():
    seen = {}

    def some(images, prompts, target):
        seen["some"] = (tuple(images.shape), prompts, target)
        return [0] * len(prompts)

    def everything(images, prompts, **columns):
        seen["everything"] = columns
        return [0] * len(prompts)

    batch = samples(2, {"target": "A", "n": 1}, {"n": 2})
    score({"some": FunctionReward(some), "everything": FunctionReward(everything)}, batch)
    assert seen["some"] == ((2, 3, 4, 4), ["prompt 0", "prompt 1"], ["A", None])
    assert seen["everything"] == {"target": ["A", None], "n": [1, 2]}


def test_pil_pictures_and_clips():
    """A function with `pil = True` gets PIL pictures; a clip is a list of them; 1.0 is 255."""
    seen = []

    def look(images, prompts):
        seen.extend(images)
        return [0] * len(prompts)

    look.pil = True
    load_reward(look)(samples(2))
    load_reward(look)(samples(2, frames=5))
    assert [image.getpixel((0, 0)) for image in seen[:2]] == [(0, 0, 0), (255, 255, 255)]
    assert [len(clip) for clip in seen[2:]] == [5, 5] and seen[2][0].size == (4, 4)


def test_a_distance_turns_its_sign():
    """Values in [0, 5], lower is better: in [-5, 0]; what abstains still does. A gate refuses it, as it may be negative."""

    def distance(images, prompts):
        return [None, 0.0, 2.0]

    distance.higher_is_better = False
    distance.traits = Traits(range=(0.0, 5.0))
    reward = load_reward(distance)
    values = reward(samples(3))
    assert values[0].isnan() and values[1:].tolist() == [0.0, -2.0] and reward.traits.range == (-5.0, 0.0)
    with pytest.raises(ValueError, match="distance may be negative"):
        load_reward("gate", of=distance, by="brightness")


def test_columns_of_the_table_follow_the_order_of_the_rewards():
    table = score({"b": lambda s: torch.ones(3), "a": lambda s: [None, 0, 0]}, samples())
    assert table.shape == (3, 2) and table[:, 0].tolist() == [1, 1, 1] and table[0, 1].isnan()
    assert score({}, samples()).shape == (3, 0)


def test_what_a_scorer_raises_is_named():
    """Functions and reward objects alike; the cause is kept for a traceback."""

    def broken(images, prompts):
        raise KeyError("weights")

    for reward in (FunctionReward(broken), lambda samples: broken(None, None)):
        with pytest.raises(RewardError, match="reward 'mine' raised KeyError: 'weights'") as error:
            score({"mine": reward}, samples())
        assert isinstance(error.value.__cause__, KeyError)


def test_rewards_by_name_path_and_object(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def half(images, prompts):\n    return [0.5] * len(prompts)\n"
        "class Level:\n"
        "    name = 'level'\n"
        "    def __init__(self, level=1.0):\n        self.level = level\n"
        "    def __call__(self, samples):\n        return [self.level] * len(samples)\n"
        "constant = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import nothing_like_this\n")
    (tmp_path / "worse_rewards.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("brightness").name == "brightness"
    assert load_reward("own_rewards.half").name == "half"
    assert load_reward("own_rewards:half")(samples()).tolist() == [0.5] * 3
    assert load_reward("own_rewards.Level", level=0.25)(samples()) == [0.25] * 3
    own = load_reward("own_rewards.Level")
    assert load_reward(own) is own
    for spec, options, message in [
        ("brightnes", {}, r"unknown reward 'brightnes'; did you mean brightness\?"),
        ("zzz", {}, f"unknown reward 'zzz'; known are {', '.join(REWARDS)}"),
        ("own_rewards.haf", {}, "own_rewards has no function or class haf"),
        ("own_rewards.constant", {}, "own_rewards has no function or class constant"),
        ("own_rewards.half", {"level": 1}, "is a function and has no options, but got level"),
        ("own_rewards.Level", {"levl": 1}, "reward 'own_rewards.Level'.*levl"),
        ("no_module_here.f", {}, "cannot import no_module_here"),
        ("broken_rewards.f", {}, "cannot import broken_rewards .*nothing_like_this"),
        ("worse_rewards.f", {}, r"cannot import worse_rewards \(ZeroDivisionError"),
        ("tiny_strict", {"modus": 1}, "reward 'tiny_strict'.*modus"),
        (".f", {}, "unknown reward"),
        ("..f", {}, "cannot import"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_reward(spec, **options)
    assert "own_rewards" in sys.modules


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("frechet", {"shrinkage": "a"}, "shrinkage='a': wants a number"),
        ("uncertain", {"of": "brightness", "views": 2.5}, "views=2.5: wants a whole number"),
        ("adversarial", {"window": [0.9]}, r"window=\[0.9\]: wants a list of 2"),
        ("layout", {"gate": 0.5}, "gate=0.5: wants a list of 2"),
        ("assessor", {"url": "http://x/v1", "costs": 3}, "costs=3: wants a mapping"),
        ("tiny_artifact", {"threshold": "high"}, "threshold='high': wants a number"),
    ],
)
def test_options_of_the_wrong_type_are_named(name, options, message):
    """In a recipe, with the reward's label before it; classes of the user's without hints are left to themselves."""
    with pytest.raises(ValueError, match=f"^mine: {message}"):
        load_rewards({"mine": {"name": name, **options}})


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert load_reward("frechet", features="pixels", shrinkage="1e-1").shrinkage == 0.1


@pytest.mark.parametrize(
    ("name", "folder"), {"preference": "tiny_preference", "artifact": "tiny_artifact", "clip_score": "tiny_clip"}.items()
)
def test_what_ships_may_be_named_where_a_folder_is_wanted(name, folder):
    given = samples(2)
    given.images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_reward(name, folder=folder)(given), load_reward(folder)(given))


def test_rewards_without_a_model():
    """brightness is the mean of all pixels; a flat picture is a smaller JPEG than noise."""
    assert load_reward("brightness")(samples(3)).tolist() == [0.0, 0.5, 1.0]
    flat = samples(1)
    flat.images = torch.full((1, 3, 32, 32), 0.5)
    noise = samples(1)
    noise.images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    jpeg = load_reward("jpeg_size")
    assert float(jpeg(noise)) < float(jpeg(flat)) < 0


def test_clean_asks_for_known_shapes_whatever_the_caption():
    from flowrl.tiny import render, sample_scene, split
    from flowrl.tiny.corrupt import corrupt

    spec, rng = split("test")[0], np.random.default_rng(0)
    scene = sample_scene(spec, rng)
    pictures = np.stack([render(scene), corrupt(scene, "tear", 1.0, rng)[0]])
    given = samples(2)
    given.images = torch.from_numpy(pictures)
    assert load_reward("tiny_clean")(given).tolist() == [1.0, 0.0]
    assert load_reward("tiny_strict")(given).isnan().all()  # these prompts say nothing of scenes


# ------------------------------------------------------------------------------------------------ what the command explains


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", [*REWARDS, *EMBEDDED])
def test_every_option_of_every_reward_is_explained(name, capsys):
    """By a sentence of its own, beside its default; `required` where there is none."""
    assert main(["rewards", name]) == 0
    out = capsys.readouterr().out
    found, implied = find_reward(name)
    assert words(inspect.cleandoc(found.__doc__)) in words(out)
    said = option_comments(found)
    for option in inspect.signature(found).parameters.values() if inspect.isclass(found) else []:
        assert len(said[option.name].split()) >= 2 and said[option.name].endswith((".", "?", "`")), option.name
        default = implied.get(option.name, option.default)
        shown = "required" if default is option.empty else "" if "factory" in repr(default) else f"{default} "
        assert words(f"{option.name} {shown} {said[option.name]}") in words(out)


def test_no_explanation_sends_the_reader_to_a_file():
    for name in REWARDS:
        text = words(find_reward(name)[0].__doc__)
        assert "the module" not in text and "this file" not in text, name


def test_the_list_says_what_each_reward_is(capsys):
    """One line each, all different, none cut off in the middle of a sentence."""
    assert main(["rewards"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line and not line.startswith("trained on")]
    assert [row.split()[0] for row in rows] == [*REWARDS, *EMBEDDED]
    assert len({row.split(maxsplit=1)[1] for row in rows}) == len(rows)
    assert all(row.endswith((".", "?")) for row in rows)
    latent = next(row for row in rows if row.startswith("tiny_latent"))
    assert "`tiny_dense` read off the latents" in latent and latent.endswith("the prompt and t.")


EXPLAINED = """
class Redness:
    '''How red.'''

    def __init__(
        self,
        gain: float = 2.0,  #: Its factor.
    ):
        self.name = "redness"
"""


def test_rewards_of_ones_own_are_explained(tmp_path, capsys, monkeypatch):
    """By dotted path, with the comments of its options; what is no reward is said as `load_reward` says it."""
    (tmp_path / "own_explained.py").write_text(EXPLAINED)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["rewards", "own_explained.Redness"]) == 0
    out = words(capsys.readouterr().out)
    assert "How red." in out and "gain 2.0 Its factor." in out and "`weight`" in out
    for name, message in [
        ("runs/nothing", "reward 'runs/nothing': there is no such folder; `flowrl train-reward` writes one"),
        (str(tmp_path), "there is no reward.json in it"),
        ("own_explained.Greenness", "own_explained has no function or class Greenness"),
        ("tiny_strikt", "unknown reward 'tiny_strikt'; did you mean tiny_strict"),
    ]:
        assert main(["rewards", name]) == 2
        assert message in capsys.readouterr().err


def test_comments_of_plain_classes_are_read(monkeypatch):
    class Own:
        """Mine."""

        def __init__(
            self,
            level: float = 1.0,  #: Where it stops.
            #: A long story,
            #: in two lines.
            names: tuple[str, ...] = ("a", "b"),
            bare: int = 3,
        ):
            levels: int = 3  #: No option.
            self.level = level * levels

    assert option_comments(Own) == {"level": "Where it stops.", "names": "A long story, in two lines.", "bare": ""}
    assert option_comments(type("Less", (Own,), {})) == option_comments(Own)
    assert option_comments(len) == {} == option_comments(type("None", (), {}))


# ------------------------------------------------------------------------------------------------ labels, clips


def folder_reward(place: Path) -> str:
    place.mkdir(parents=True)
    (place / "reward.json").write_text('{"reward": "artifact", "options": {"folder": "tiny_artifact"}}')
    return str(place)


def test_folders_are_called_by_their_last_name_where_that_is_unique(tmp_path, monkeypatch):
    monkeypatch.setattr("flowrl.reward_models.base._from_folder", lambda folder, options: load_reward("brightness"))
    mine, other, twin = (folder_reward(tmp_path / name) for name in ("a/mine", "a/other", "b/mine"))
    assert list(load_rewards({mine: 1.0, other: {"weight": 2}, "brightness": 1})) == ["mine", "other", "brightness"]
    assert list(load_rewards({mine: 1.0, twin: 1.0, other: 1.0})) == [mine, twin, "other"]
    assert list(load_rewards({mine: 1.0, "mine": {"name": "jpeg_size"}})) == [mine, "mine"]
    assert list(load_rewards({mine: 1.0}, beside=[twin])) == [mine] and list(load_rewards({mine: 1.0}, beside=[mine])) == ["mine"]


def test_clips_of_a_model_of_pictures_are_refused_before_it_is_loaded(tmp_path, monkeypatch):
    class OfClips:
        name, traits = "of_clips", Traits(needs=("clips",))

        def __call__(self, samples):
            return samples.images.mean((1, 2, 3, 4))

    def loaded(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Policy, "load", loaded)
    recipe = load_recipe("quickstart", [f"output_dir={tmp_path}/run"])
    with pytest.raises(ConfigError, match=r"rewards.motion scores clips, and StableDiffusion3Pipeline draws pictures"):
        Trainer(recipe, rewards={"motion": OfClips()})
    assert not (tmp_path / "run").exists()
    recipe.model = "somebody/some-model"  # not here: nothing can be said before it is
    with pytest.raises(AssertionError, match="weights were loaded"):
        Trainer(recipe, rewards={"motion": OfClips()})
