"""`flowrl train-reward`: the loop to the bit, the tasks on data with a known answer, and the reward models that ship."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from flowrl.batch import Prompt, Samples
from flowrl.config import ConfigError
from flowrl.pairs import PreferencePair, RankedList
from flowrl.record import STATE, checkpoints, read_metrics, trained_parts
from flowrl.reward_models import EMBEDDED, load_reward
from flowrl.reward_models.base import embedded_folder
from flowrl.tiny.pairs import word_tests
from flowrl.train.rewards import TASKS
from flowrl.train.rewards.contrastive import contrastive_loss, tiny_clip
from flowrl.train.rewards.loop import RewardTrainer, held_out_prompts, load_reward_recipe, picks, seeds
from flowrl.train.rewards.preference import Preference, differences, padded
from tests.runs import SERVER, finish, ranks, run, start
from tests.test_resume import lines, wait_for

RED, BLUE = (0.8, 0.1, 0.1), (0.1, 0.1, 0.8)
SMALL = {"width": 32, "layers": 2, "text_width": 32, "text_layers": 1, "dim": 8, "patch": 8, "size": 16}


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with a small encoder and 24 pairs of 6 prompts: the chosen picture is blue, the other one red, which the untrained
    encoder likes better; every sixth is a tie of two reds. The recipe trains on it at 50 steps a second."""
    folder = tmp_path_factory.mktemp("preference")
    torch.manual_seed(0)
    tiny_clip(**SMALL).save(folder / "encoder")
    for name, color in (("red", (200, 20, 20)), ("red2", (230, 60, 40)), ("blue", (20, 20, 200)), ("blue2", (60, 40, 230))):
        Image.new("RGB", (20, 16), color).save(folder / f"{name}.png")
    rows = []
    for i in range(24):
        one, other, label = ("red", "red2", 0.5) if i % 6 == 5 else ("blue2", "red", 1) if i % 2 else ("red2", "blue", 0)
        rows.append({"prompt": f"a {i % 6}", "jpg_0": f"{one}.png", "jpg_1": f"{other}.png", "label_0": label})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "task": {
            "name": "preference",
            "data": str(folder / "pairs.jsonl"),
            "backbone": str(folder / "encoder"),
            "eval_share": 0.3,
        },
        "batch_size": 8,
        "learning_rate": 3e-3,
        "lr_warmup_steps": 3,
        "ema_decay": 0.8,
        "max_steps": 4,
        "eval_steps": 2,
        "checkpointing_steps": 0,
        "report_to": "none",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def trainer(data: Path, out: Path, *overrides: str) -> RewardTrainer:
    return RewardTrainer(load_reward_recipe(data / "recipe.yaml", [f"output_dir={out}", *overrides]))


def plain(color: tuple[float, float, float], prompt: str = "a 0") -> Samples:
    images = torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    return Samples([Prompt(prompt)], [0], torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1), images)


# ------------------------------------------------------------------------------------------------ the loop


def test_a_preference_is_learnt_kept_and_used(data, tmp_path, capsys):
    """Blue over red: held-out accuracy from 0 to 1. The folder is a reward with a card and a table of both."""
    run = trainer(data, tmp_path / "blue", "max_steps=40", "report_to=tensorboard", "checkpointing_steps=20")
    folder = run.train()
    rows = read_metrics(folder)
    assert rows[0]["step"] == 0 and rows[0].keys() == {"step", *(name for name in rows[0] if name.startswith("eval/"))}
    assert rows[0]["eval/accuracy"] == 0 and rows[-1]["eval/accuracy"] == 1 and rows[-1]["loss"] < 0.5 * rows[1]["loss"]
    reward = load_reward(folder)
    assert reward.name == "blue" and float(reward(plain(BLUE))) > float(reward(plain(RED))) + 1
    assert {path.name for path in folder.iterdir()} >= {"README.md", "reward.json", "recipe.yaml", "environment.json", "tracker"}
    assert [place.name for place in checkpoints(folder)] == ["checkpoint-40"]
    card, out = (folder / "README.md").read_text(), capsys.readouterr().out
    assert f"Use it: flowrl train quickstart rewards.{folder}=1" in out
    row = next(line for line in card.splitlines() if line.startswith("| accuracy "))
    decided = sum(pair.label != 0.5 for pair in run.task.test_set)
    assert row.strip() in out and "40 steps of 8 examples" in card
    assert [cell.strip() for cell in row.split("|")] == ["", "accuracy", str(decided), "0.000", "1.000", ""] and decided >= 4
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.glob("*.safetensors"))
    with pytest.raises(ConfigError, match="is a run of train-reward: a reward, "):
        trained_parts(folder)


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    place = folder / f"checkpoint-{step}" / STATE
    optimizer = torch.load(place / "optimizer.pt", weights_only=True)["state"]
    tensors = {f"optimizer/{i}/{key}": value for i, moments in optimizer.items() for key, value in moments.items()}
    for name in ("model", "averages"):
        tensors |= {f"{name}/{key}": value for key, value in load_file(place / f"{name}.safetensors").items()}
    return tensors


def metrics(folder: Path) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "step_time"} for row in read_metrics(folder)]


def assert_same_run(one: Path, other: Path, step: int) -> None:
    a, b = state(one, step), state(other, step)
    assert a.keys() == b.keys() and len(a) > 20
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    assert metrics(one) == metrics(other)
    results = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_resuming_is_bit_for_bit(data, tmp_path):
    """5 steps, against the same from step 2 on in another process: warm-up, decay and an epoch are cut through."""
    argv = ["train-reward", data / "recipe.yaml", "lr_decay_from=0.2", "max_steps=5", "checkpointing_steps=2"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    done = run([*argv, f"output_dir={whole}", "checkpoints_total_limit=0"], tmp_path / "log")
    assert done.code == 0, done.err
    assert [place.name for place in checkpoints(whole)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-4", "checkpoint-5", "*.safetensors", "reward.json"))
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2", dirs_exist_ok=True)
    done = run([*argv, f"output_dir={resumed}", "resume_from_checkpoint=latest"], tmp_path / "log")
    assert done.code == 0, done.err
    assert f"resuming from {resumed}/checkpoint-2" in done.out
    assert_same_run(whole, resumed, 5)


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    argv = ["train-reward", data / "recipe.yaml", f"output_dir={tmp_path}/run", "lr_decay_from=1"]
    process = start([*argv, "max_steps=100000", "eval_steps=0"], tmp_path / "log")
    wait_for(lambda: lines(tmp_path / "run") >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    stopped = finish(process, tmp_path / "log")
    assert stopped.code == 130 and "Traceback" not in stopped.err
    (place,) = checkpoints(tmp_path / "run")
    step = int(place.name.split("-")[1])
    assert lines(tmp_path / "run") == step and not (tmp_path / "run" / "reward.json").exists()
    command = stopped.out.split("Go on with: ")[1].strip()
    assert command == f"flowrl train-reward {tmp_path}/run/recipe.yaml resume_from_checkpoint=latest"
    done = run([*command.split()[1:], f"max_steps={step + 1}"], tmp_path / "log")
    assert done.code == 0, done.err
    straight = [*argv[:2], f"output_dir={tmp_path}/straight", "lr_decay_from=1", "eval_steps=0", f"max_steps={step + 1}"]
    assert run(straight, tmp_path / "log").code == 0
    assert_same_run(tmp_path / "straight", tmp_path / "run", step + 1)


def in_process(recipe: str, out: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    RewardTrainer(load_reward_recipe(recipe, [f"output_dir={out}"])).train()


def test_two_processes_train_what_one_does(data, tmp_path):
    """Half of each batch in each process, gradients averaged: the same weights and the same losses, up to rounding."""
    recipe = str(data / "recipe.yaml")
    in_process(recipe, f"{tmp_path}/1", {})
    both = [SERVER.Process(target=in_process, args=(recipe, f"{tmp_path}/2", env)) for env in ranks(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    one, two = (load_file(tmp_path / name / "checkpoint-4" / STATE / "averages.safetensors") for name in "12")
    # the gradient of a key's bias is 0 but for rounding, which AdamW blows up to full steps
    assert [key for key in one if "k_proj.bias" not in key and not torch.allclose(one[key], two[key], atol=2e-4)] == []
    for a, b in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert a.keys() == b.keys() and a.get("loss", 0) == pytest.approx(b.get("loss", 0), abs=1e-4)


def test_batches_are_permutations_without_a_state():
    """10 examples in batches of 4: every epoch takes each once, across the borders of batches; another seed, another order."""
    recipe = load_reward_recipe({"batch_size": 4})
    drawn = [i for step in range(5) for i in picks(10, recipe, step)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    assert drawn != [i for step in range(5) for i in picks(10, load_reward_recipe({"batch_size": 4, "seed": 1}), step)]
    assert len({seed for step in range(5) for seed in seeds(recipe, step)}) == 20


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=preferences"], "unknown task 'preferences'; did you mean preference?"),
        (["task.hed=cos"], "unknown task option 'hed'; did you mean head?"),
        (["learning_rat=1"], "unknown recipe option 'learning_rat'; did you mean learning_rate?"),
        (["max_steps=0"], "max_steps=0: must be positive"),
        (["ema_decay=1"], "ema_decay=1.0: must lie in"),
        (["task.head=gaussian"], "a gaussian head and the gaussian objective go together"),
        (["task.objective=triplet", "task.head=linear"], "it wants head=cos"),
        (["task.tie_factor=1"], "tie_factor=1.0: must exceed 1"),
        (["task.freeze=2"], "task.freeze=2.0: a share"),
        (["task.interpolation=0"], "task.interpolation=0.0: a part above 0"),
        (["task.data=nowhere.jsonl"], "task.data: no preference data at nowhere.jsonl"),
        (["task.backbone=nowhere"], "task.backbone: no .* at nowhere"),
        (["resume_from_checkpoint=latest"], "no checkpoint in"),
        (["report_to=rubbish"], "report_to='rubbish': choose among"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(data, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        trainer(data, tmp_path / "run", *overrides)


def test_the_command_refuses_in_one_line(data, tmp_path):
    done = run(["train-reward", data / "recipe.yaml", f"output_dir={tmp_path}/run", "task.data=pairs.csv"], tmp_path / "log")
    assert done.code == 2 and done.err.strip().splitlines()[-1] == "flowrl: task.data: no preference data at pairs.csv"
    done = run(["train-reward", "tiny-prefernce"], tmp_path / "log")
    assert done.code == 2 and done.err.strip() == "flowrl: no recipe tiny-prefernce; did you mean tiny-preference?"


def test_a_checkpoint_of_another_task_is_refused(data, tmp_path):
    trainer(data, tmp_path / "run").train()
    with pytest.raises(ConfigError, match="was trained with task="):
        trainer(data, tmp_path / "run", "task.freeze=0.5", "resume_from_checkpoint=latest")
    with pytest.raises(ConfigError, match="holds a run already"):
        trainer(data, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-4" / STATE / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="checkpoint-4 is damaged"):
        trainer(data, tmp_path / "run", "resume_from_checkpoint=latest")


def test_every_task_and_every_recipe_that_ships_can_be_named():
    from flowrl.config import recipe_names
    from flowrl.train.rewards.loop import load_task
    from flowrl.train.rewards.recipe import RECIPES

    names = recipe_names(RECIPES)
    assert {"tiny-clip", "tiny-preference"} <= set(names)
    for name in names:
        recipe = load_reward_recipe(name)
        assert recipe.task["name"] in TASKS
        task = load_task(recipe.task)
        assert all(callable(getattr(task, method)) for method in ("prepare", "batch", "loss", "evaluate", "save", "describe"))


# ------------------------------------------------------------------------------------------------ preference


@pytest.mark.parametrize(
    "options",
    [
        ["objective=ties"],
        ["objective=triplet", "margin=0.1"],
        ["objective=ranked_pairs", "head=linear"],
        ["objective=plackett_luce"],
        ["objective=gaussian", "head=gaussian"],
        ["objective=gaussian", "head=gaussian", "variance=marginal"],
        ["objective=bradley_terry", "margin=0.5", "freeze=0.5", "resize=pad"],
    ],
    ids=" ".join,
)
def test_every_objective_learns_to_prefer_blue(data, tmp_path, options):
    run = trainer(data, tmp_path / "run", "max_steps=30", "eval_steps=0", *(f"task.{option}" for option in options))
    frozen = {name: p.clone() for name, p in run.module.named_parameters() if not p.requires_grad}
    folder = run.train()
    assert run.held_out["accuracy"].value == 1, run.held_out
    reward = load_reward(folder)
    assert float(reward(plain(BLUE))) > float(reward(plain(RED)))
    assert bool(frozen) == ("freeze=0.5" in options)
    assert all(torch.equal(p, run.module.get_parameter(name)) for name, p in frozen.items())
    saved = state(folder, 30)
    assert not any(f"model/{name}" in saved for name in frozen)


def test_a_gaussian_head_doubts_what_labels_disagree_on(tmp_path, data):
    """The same two pictures, chosen always the first under one prompt, now one and now the other under another: a large
    difference of means, and none."""
    rows = [("sure 0", 1), ("sure 0", 1), ("open 1", 1), ("open 1", 0)] * 4
    lines = [
        {"prompt": p, "jpg_0": str(data / "red.png"), "jpg_1": str(data / "blue.png"), "label_0": label} for p, label in rows
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [f"task.data={tmp_path}/pairs.jsonl", f"task.eval_data={tmp_path}/pairs.jsonl", "batch_size=16", "max_steps=60"]
    options += ["task.head=gaussian", "task.objective=gaussian", "task.variance=marginal", "eval_steps=0"]
    run = trainer(data, tmp_path / "run", *options)
    reward = load_reward(run.train())
    sure, both = (float(reward(plain(RED, prompt)) - reward(plain(BLUE, prompt))) for prompt in ("sure 0", "open 1"))
    assert sure > 2 > abs(both), (sure, both)
    assert (reward.distribution(plain(RED))[:, 1] > 0).all() and run.held_out["calibration_error"].value < 0.2


def test_weights_between_the_first_and_the_trained_ones(data, tmp_path):
    """interpolation=0.25 saves first + (average - first) / 4, and training goes on from the trained ones."""
    run = trainer(data, tmp_path / "run", "task.interpolation=0.25", "eval_steps=1")
    folder = run.train()
    first = load_file(data / "encoder" / "model.safetensors")
    saved, averages = load_file(folder / "model.safetensors"), load_file(folder / "checkpoint-4" / STATE / "averages.safetensors")
    for name, value in saved.items():
        key = f"backbone.model.{name}"
        if key in averages:
            between = first[name].float() + (averages[key] - first[name].float()) / 4
            assert torch.allclose(value.float(), between, atol=2e-3), name
    whole = trainer(data, tmp_path / "whole", "eval_steps=1")
    whole.train()
    assert all(torch.equal(averages[key], value) for key, value in whole.averages.items())


def test_pickscore_weights(data, tmp_path):
    """A pair of a prompt with three examples weighs a third: (l0 + l1 / 3) / (4 / 3)."""
    run = trainer(data, tmp_path / "run")
    task = run.task
    assert isinstance(task, Preference)
    pairs = [
        PreferencePair("a 0", data / "red.png", data / "blue.png", 1, 1),
        PreferencePair("a 1", data / "blue.png", data / "red.png", 1, 1 / 3),
    ]
    one, two = (task.loss([pair])[0].item() for pair in pairs)
    assert task.loss(pairs)[0].item() == pytest.approx((one + two / 3) / (4 / 3), rel=1e-4)


def test_lists_of_different_lengths(data, tmp_path):
    """A longer neighbour in the batch changes nothing; ranks 1, 3, 2 give three labelled differences."""
    run = trainer(data, tmp_path / "run", "task.objective=plackett_luce")
    pictures = tuple(data / f"{name}.png" for name in ("red", "blue", "red2"))
    two, three = RankedList("a 0", pictures[:2], (1, 2)), RankedList("a 1", pictures, (1, 3, 2))
    alone = [run.task.loss([example])[0].item() for example in (two, three)]
    assert run.task.loss([two, three])[0].item() == pytest.approx(sum(alone) / 2, rel=1e-4)
    d, label = differences(torch.tensor([[1.0, 2.0, 4.0]]), [three])
    assert d.tolist() == [1, 3, 2] and label.tolist() == [0, 0, 1]
    assert padded([torch.ones(2), torch.ones(3)], 7.0).tolist() == [[1, 1, 7], [1, 1, 1]]


def test_a_share_of_the_prompts_is_held_out():
    """3 of 7, as .3 x 7 = 2.1 is rounded up; however often a prompt comes, and in which order; of one prompt nothing is left."""
    prompts = [f"a {i}" for i in range(7)]
    held = held_out_prompts(prompts, 0.3, 0, "pairs.jsonl")
    assert len(held) == 3 and held < set(prompts)
    assert held_out_prompts(prompts[::-1] * 4 + ["a 3"], 0.3, 0, "pairs.jsonl") == held
    assert len({frozenset(held_out_prompts(prompts, 0.3, seed, "pairs.jsonl")) for seed in range(8)}) > 1
    with pytest.raises(ValueError, match=r"pairs.jsonl has one prompt only: name held-out data in task.eval_data"):
        held_out_prompts(["a", "a"], 0.3, 0, "pairs.jsonl")


def test_held_out_prompts_are_not_trained_on(data, tmp_path):
    task = trainer(data, tmp_path / "run").task
    train, test = ({example.prompt for example in part} for part in (task.train_set, task.test_set))
    assert not train & test and len(test) == 2 and len(train | test) == 6


def test_pairs_of_a_run_train_a_reward(data, tmp_path):
    """Samples that a training run left behind, compared by their reward."""
    place = tmp_path / "samples" / "step-000001"
    place.mkdir(parents=True)
    rows = []
    for i in range(12):
        color = (200, 20, 20) if i % 2 else (20, 20, 200)
        Image.new("RGB", (16, 16), color).save(place / f"{i:04d}.png")
        rows.append({"file": f"{i:04d}.png", "prompt": f"a {i // 4}", "group": i // 4, "rewards": {"redness": i % 2}})
    (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trainer(data, tmp_path / "run", f"task.data={tmp_path}", "task.reward=redness", "max_steps=20", "eval_steps=0")
    run.train()
    assert run.held_out["accuracy"].value == 1 and run.held_out["ties"].value == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------------------ a dual encoder


def test_contrastive_loss_by_hand():
    """Logits 2 on the diagonal, 1 and 0 beside it: rows cost ln(1 + e^-1) and ln(1 + e^-2), columns ln(1 + e^-2), ln(1 + e^-1).

    Where the first picture shows the second caption too, that entry is left out: the first row and the second column cost 0.
    """
    logits = torch.tensor([[2.0, 1.0], [0.0, 2.0]])
    a, b = 0.313262, 0.126928
    assert float(contrastive_loss(logits, torch.eye(2, dtype=torch.bool))) == pytest.approx((a + b) / 2, abs=1e-5)
    shown = torch.tensor([[True, True], [False, True]])
    assert float(contrastive_loss(logits, shown)) == pytest.approx(b / 2, abs=1e-5)


def test_a_dual_encoder_is_trained_and_loads(tmp_path):
    options = [
        "task.width=32",
        "task.layers=1",
        "task.text_width=32",
        "task.text_layers=1",
        "task.dim=16",
        "task.eval_pictures=0",
    ]
    recipe = load_reward_recipe("tiny-clip", [*options, "batch_size=16", "max_steps=12", "lr_warmup_steps=2", "eval_steps=0"])
    recipe.output_dir, recipe.report_to = f"{tmp_path}/clip", "none"
    folder = RewardTrainer(recipe).train()
    rows = read_metrics(folder)
    assert rows[-1]["loss"] < rows[0]["loss"] and 0.3 < rows[-1]["eval/accuracy"] < 1
    assert -1 <= float(load_reward(folder)(plain((0.9, 0.1, 0.1), "a red circle"))) <= 1


# ------------------------------------------------------------------------------------------------ what ships


@pytest.fixture(scope="module")
def words() -> tuple[Samples, Samples]:
    """120 held-out scenes with their captions, and with captions one word away that are false."""
    images, right, wrong = word_tests(20, seed=9)
    ids, none = torch.arange(len(images)), torch.zeros(len(images), 1)
    pair = [
        Samples([Prompt(s["prompt"]) for s in specs], ids.tolist(), ids, none, torch.from_numpy(images))
        for specs in (right, wrong)
    ]
    return pair[0], pair[1]


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("tiny_clip", 0.93),
        ("tiny_preference", 0.8),
        ("tiny_preference_1", 0.8),
        ("tiny_preference_2", 0.8),
        ("tiny_yes_token", 0.8),
    ],
)
def test_the_embedded_models_tell_a_wrong_word(words, name, least):
    reward = load_reward(name)
    right, wrong = (reward(samples) for samples in words)
    assert float((right > wrong).float().mean()) > least


def test_what_ships_is_named_small_and_has_a_card():
    places = {place.name: place for place in embedded_folder("tiny_clip").parent.iterdir() if place.is_dir()}
    assert set(places) == set(EMBEDDED)
    for name, place in places.items():
        files = [file for file in place.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 2e6, name
        assert {file.suffix for file in files} <= {".safetensors", ".json", ".md", ".jinja"}, name
        assert f'load_reward("{name}")' in (place / "README.md").read_text() and load_reward(name).name == name


#: What docs/papers.md says of each held-out number, as it is rounded there.
CHOICES = ("accuracy", "accuracy_with_ties", "calibration_error", "accuracy_strict")
SCENES = ("scenes/auc", "scenes/tear/auc", "scenes/bleed/auc", "scenes/map_auc", "samples/auc")
PAPERS = {
    "tiny_clip": {"accuracy": ".973", "position": ".89", "drawn": ".781"},
    "tiny_preference": dict(zip(CHOICES, (".634", ".482", ".115", ".762"), strict=True)),
    "tiny_preference_1": dict(zip(CHOICES, (".640", ".489", ".106", ".765"), strict=True)),
    "tiny_preference_2": dict(zip(CHOICES, (".598", ".463", ".120", ".712"), strict=True)),
    "tiny_artifact": dict(zip(SCENES, (".970", ".983", ".858", ".961", ".839"), strict=True)),
    "tiny_yes_token": {"accuracy": ".867", "pairs": ".883", "pairs/counting": ".85", "samples/pairs": ".642"},
    "tiny_latent": {"pair_accuracy/t0.0": ".70", "pair_accuracy/t0.4": ".70", "pair_accuracy/t0.6": ".57"},
    "tiny_transport": {"frechet_of_texts": ".111", "frechet": ".021", "accuracy": ".984"},
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_table_of_papers_says_what_the_cards_say(name):
    page = (Path(__file__).parent.parent / "docs" / "papers.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}`")]
    card = (embedded_folder(name) / "README.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines()]
    scores = {cells[0]: (int(cells[1]), float(cells[3])) for cells in table if len(cells) == 4 and cells[1].isdecimal()}
    for number, said in PAPERS[name].items():
        n, value = scores[number]
        assert said in row and abs(value - float(said)) <= 0.5 * 10 ** (1 - len(said)) + 1e-9 and n >= 40, number
