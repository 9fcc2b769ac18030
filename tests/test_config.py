"""A recipe is read, overridden and refused in one sentence that names the option and the fix."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from flowrl.cli import main
from flowrl.config import ConfigError, Plan, Recipe, build, coerced, load_recipe, recipe_names
from flowrl.reward_models.base import find_reward
from flowrl.train.balancing import Balancing
from flowrl.train.objectives import OBJECTIVES


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_that_ship_are_valid(name, capsys):
    """Its first line says what it is, its second how to start it; `flowrl plan` works it out for as many processes.

    Its rewards exist and have the options that it sets, and its way of balancing goes with its objective.
    """
    first, second, *_ = files("flowrl.train.recipes").joinpath(f"{name}.yaml").read_text().splitlines()
    assert first.startswith("# ") and first.endswith(".")
    command = re.fullmatch(rf"# (?:accelerate launch --num_processes (\d+) -m flowrl.cli|flowrl) train {name}(?: .*)?", second)
    assert command, second
    processes = command[1] or "1"
    assert main(["plan", name, "--no-memory", "--processes", processes]) == 0
    assert re.search(rf"^processes +{processes}$", capsys.readouterr().out, re.MULTILINE)
    recipe = load_recipe(name)
    assert recipe.output_dir == f"runs/{name}"
    assert recipe.data is not None or recipe.rewards
    for reward, options in used_rewards({**recipe.rewards, **recipe.eval_rewards}):
        made, implied = find_reward(reward)
        known = inspect.signature(made).parameters if inspect.isclass(made) else {}
        assert not set(options) - set(known), reward
        assert not [p for p in known.values() if p.default is p.empty and p.name not in {*options, *implied}], reward
    Balancing.of(recipe, build(recipe.objective, OBJECTIVES, "objective"), dict.fromkeys(recipe.rewards, 1.0))


def used_rewards(section):
    """(name, options) of every reward of a recipe's section, those inside others too."""
    for label, value in section.items():
        options = {k: v for k, v in value.items() if k not in ("weight", "shape")} if isinstance(value, dict) else {}
        name = options.pop("name", label)
        yield name, options
        for inner in (options[key] for key in ("of", "by") if key in options):
            yield from used_rewards({inner: 1.0} if isinstance(inner, str) else {inner["name"]: inner})


@cache
def shipped() -> list[Recipe]:
    return [load_recipe(name) for name in recipe_names()]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_a_small_and_a_large_recipe(name):
    """One on the embedded model and one on a model that has to be downloaded."""
    models = {recipe.model for recipe in shipped() if recipe.objective["name"] == name}
    assert "tiny-sd3" in models and any("/" in model for model in models)


def test_every_option_is_documented():
    for field in dataclasses.fields(Recipe):
        assert field.metadata["help"].endswith("."), field.name


def test_a_recipe_survives_its_own_yaml():
    recipe = load_recipe("tiny-grpo", ["objective.epsilon=1e-5", "rewards.brightness=0.5", "lora_targets=[to_q]"])
    assert load_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        ("1e-4", float | None, 1e-4),
        (None, float | None, None),
        ("x", float | str, "x"),  # the first that fits
        (Path("x"), str | Path, Path("x")),
        ([1, "2"], tuple[float, float], (1.0, 2.0)),
        (["a", 1], tuple[str, ...], ("a", "1")),
        ((), tuple[str, ...], ()),
    ],
)
def test_values_become_what_hints_want(value, hint, result):
    assert coerced(value, hint, "key") == result


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ("x", float | None, "key='x': wants a number"),
        ([1], tuple[float, float], r"key=\[1\]: wants a list of 2"),
        ("ab", tuple[str, ...], "key='ab': wants a list$"),
        ([1, "x"], tuple[float, float], "key='x': wants a number"),
    ],
)
def test_values_that_hints_refuse(value, hint, message):
    with pytest.raises(ConfigError, match=message):
        coerced(value, hint, "key")


def test_overrides_reach_options_and_sections():
    recipe = load_recipe(
        {"objective": {"name": "grpo", "beta": 0.1}, "rewards": {"tiny_dense": 1}},
        ["learning_rate=1e-4", "objective.epsilon=1e-5", "rewards.jpeg_size=2", "train=full", "seed=3", "lora=null"],
    )
    assert recipe.learning_rate == 1e-4  # YAML reads 1e-4 as text
    assert recipe.objective == {"name": "grpo", "beta": 0.1, "epsilon": "1e-5"}
    assert build(recipe.objective, OBJECTIVES, "objective").epsilon == 1e-5
    assert recipe.rewards == {"tiny_dense": 1, "jpeg_size": 2}
    assert (recipe.train, recipe.seed, recipe.lora) == ("full", 3, None)


def test_naming_another_class_drops_the_options_of_the_first():
    """transition=flow_sde on a recipe with DDIM's eta would otherwise fail on an option that nobody typed."""
    values = {"transition": {"name": "ddim", "eta": 1.0}}
    assert load_recipe(values, ["transition=flow_sde"]).transition == {"name": "flow_sde"}
    assert load_recipe(values, ["transition.name=cps", "transition.noise_level=0.5"]).transition == {
        "name": "cps",
        "noise_level": 0.5,
    }


def test_null_takes_a_reward_out():
    assert load_recipe({"rewards": {"a": 1, "b": 2}}, ["rewards.a=null"]).rewards == {"b": 2}


def test_overrides_leave_the_mapping_they_start_from_alone():
    values = {"rewards": {"a": 1}}
    load_recipe(values, ["rewards.b=2", "max_steps=3"])
    assert values == {"rewards": {"a": 1}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_generation=4"], "unknown recipe option 'num_generation'; did you mean num_generations?"),
        (["objectve.epsilon=1"], "unknown recipe option 'objectve'; did you mean objective?"),
        (["max_steps"], "'max_steps': overrides look like key=value"),
        (["max_steps=ten"], "max_steps='ten': wants a whole number"),
        (["max_steps=1.5"], "max_steps=1.5: wants a whole number"),
        (["max_steps=true"], "max_steps=True: wants a whole number"),
        (["max_steps=.inf"], "max_steps=inf: wants a whole number"),
        (["max_steps=0"], "max_steps=0: must be positive"),
        (["learning_rate=.nan"], "learning_rate=nan: wants a number"),
        (["learning_rate=.inf"], "learning_rate=inf: wants a number"),
        (["learning_rate=-1"], "learning_rate=-1.0: must be positive"),
        (["adam_beta1=1"], "adam_beta1=1.0: must lie in [0, 1)"),
        (["ema_decay=1.5"], "ema_decay=1.5: must lie in [0, 1)"),
        (["checkpoints_total_limit=-1"], "checkpoints_total_limit=-1: must not be negative"),
        (["max_minutes=0"], "max_minutes=0.0: must be positive"),
        (["height=-64"], "height=-64: must be positive"),
        (["train=lra"], "train='lra': choose one of lora, full"),
        (["checks=maybe"], "checks='maybe': true or false"),
        (["lora_targets=to_q"], "lora_targets='to_q': wants a list"),
        (["rewards=[brightness]"], "rewards=['brightness']: wants a mapping"),
        (["lora_targets=[to_q"], "lora_targets=[to_q: not valid YAML"),
        (["output_dir=2024-13-45"], "output_dir=2024-13-45: not valid YAML"),
        (["output_dir="], "output_dir is empty"),
        (["max_steps.x=1"], "max_steps"),
        (["num_generations=1"], "num_generations=1: a group of one has no advantage; use at least 2"),
        (["num_inference_steps=1"], "num_inference_steps=1: the last step is deterministic"),
        (["rewards={}"], "rewards is empty: name at least one"),
        (["eval_steps=5", "eval_prompts=null"], "eval_steps is set but eval_prompts is not"),
    ],
)
def test_bad_options_are_named(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_recipe("quickstart", overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"max_steps: 1\nrewards: {a: 1\n", ", line 3: not valid YAML"),
        (b"- a\n- b\n", "a recipe is a mapping of options"),
        (b"", "a recipe is a mapping of options"),
        (b"model: \xff\xfe", "is not UTF-8 text (byte 7)"),
        (b"1: 2\n", "unknown recipe option 1"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_recipe(file)
    assert message in str(error.value)


def test_unknown_recipes_and_classes():
    with pytest.raises(ConfigError, match="no recipe quickstrat; did you mean quickstart?"):
        load_recipe("quickstrat")
    with pytest.raises(ConfigError, match="unknown objective 'grp'; did you mean grpo?"):
        build("grp", OBJECTIVES, "objective")
    with pytest.raises(ConfigError, match="objective has no name: choose one of"):
        build({"epsilon": 1}, OBJECTIVES, "objective")
    with pytest.raises(ConfigError, match="unknown objective option 'epsilonn'; did you mean epsilon?"):
        build({"name": "grpo", "epsilonn": 1}, OBJECTIVES, "objective")
    with pytest.raises(ConfigError, match=r"objective: epsilon=-1.0: must be positive"):
        build({"name": "grpo", "epsilon": -1}, OBJECTIVES, "objective")


def test_the_plans_arithmetic():
    """12 prompts x 8 generations on 2 processes with 3 updates: 16 images per update and process, in 4 batches of 4.

    Each batch is replayed at 2 trained steps: 8 backward passes per update.
    """
    recipe = Recipe(prompts_per_step=12, num_generations=8, updates_per_step=3, batch_size=4)
    plan = Plan(recipe, 2, 2).check()
    assert (plan.images_per_step, plan.images_per_update, plan.batch_size) == (96, 16, 4)
    assert plan.gradient_accumulation_steps == 8
    assert Plan(dataclasses.replace(recipe, batch_size=999), 2, 2).check().batch_size == 16


def test_the_plan_proposes_values_that_divide():
    """Every value in the message works when it is put in."""
    recipe = Recipe(prompts_per_step=7, num_generations=6, batch_size=6)
    with pytest.raises(ConfigError, match=r"prompts_per_step=7 does not divide over 2 .* use 6 or 8$"):
        Plan(recipe, 2, 1).check()
    for valid in (6, 8):
        Plan(dataclasses.replace(recipe, prompts_per_step=valid), 2, 1).check()
    with pytest.raises(ConfigError, match=r"batch_size=4 does not divide the 42 images .* use 2, 3, 6$"):
        Plan(dataclasses.replace(recipe, batch_size=4), 1, 1).check()
    for valid in (2, 3, 6):
        Plan(dataclasses.replace(recipe, batch_size=valid), 1, 1).check()


def test_learning_rate_schedule():
    """Warm-up over 4 updates; with 100 steps and lr_decay_from 0.6, full until step 60, half at step 80, 1/40 at the last."""
    from flowrl.record import Progress
    from flowrl.train.loop_habits import lr_factor

    recipe = Recipe(max_steps=100, lr_warmup_steps=4, lr_decay_from=0.6)
    factors = [lr_factor(recipe, Progress(step=step, updates=step)) for step in (0, 3, 60, 80, 99)]
    assert factors == pytest.approx([0.25, 1, 1, 0.5, 0.025])
    assert lr_factor(Recipe(max_steps=10), Progress(step=9, updates=9)) == 1


@pytest.mark.parametrize("branches", ["[1]", "[3]", "[2.5]", "[a]", "[4, 4]"])
def test_branches_are_whole_numbers_that_divide_a_group(branches):
    with pytest.raises(ConfigError, match="whole numbers from 2 up"):
        load_recipe("quickstart", [f"branches={branches}"])
