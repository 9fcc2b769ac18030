"""The command line: it answers at once, bad input ends with one clear line and leaves nothing behind, good input works."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from flowrl.cli import main, set_spinning
from flowrl.record import checkpoints, read_metrics
from tests.runs import FLOWRL, run, run_installed

OWN_REWARDS = """
def red(images, prompts):
    return images[:, 0].flatten(1).mean(1)

def short(images, prompts):
    return [1.0]

def text(images, prompts):
    return ["good"] * len(prompts)

def infinite(images, prompts):
    return [float("inf")] * len(prompts)

def silent(images, prompts):
    return [None] * len(prompts)

def constant(images, prompts):
    return [0.25] * len(prompts)

def broken(images, prompts):
    raise ValueError("no scorer\\nat this address")

calls = 0

def broken_later(images, prompts):
    global calls
    calls += 1
    if calls == 2:
        raise ConnectionError("the scorer went away")
    return red(images, prompts)
"""


@pytest.fixture
def own_rewards(tmp_path, monkeypatch) -> Path:
    """A folder with `own_rewards.py`; the command is called from there."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "own_rewards.py").write_text(OWN_REWARDS)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("own_rewards", None)
    return folder


def refused(capsys, *argv: object) -> str:
    """The one line with which the command refuses these arguments."""
    capsys.readouterr()
    try:
        code = main([str(a) for a in argv])
    except SystemExit as stop:  # argparse's
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2, err
    line = err.splitlines()[-1]
    assert line.startswith("flowrl: ") and len(line) > 20 and "Traceback" not in err
    return line


# ------------------------------------------------------------------------------------------------ answers at once


@pytest.mark.parametrize(
    "argv", [["--help"], ["--version"], ["train", "--help"], ["recipes"], ["eval", "--help"], ["sample", "--help"]]
)
def test_help_is_quick_and_imports_no_torch(argv):
    """Less than a second of CPU time, without torch, diffusers or numpy."""
    code = (
        "import sys\nfrom flowrl.cli import main\n"
        f"try:\n    main({argv!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout and after.ru_utime - before.ru_utime < 1


def test_help_lists_commands_and_options():
    assert "flowrl train quickstart" in run_installed().out
    helped = run_installed("train", "--help").out
    for word in ("num_generations", "Samples per prompt", "resume_from_checkpoint", "quickstart"):
        assert word in helped


# ------------------------------------------------------------------------------------------------ train, bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["num_generation=4"], "unknown recipe option 'num_generation'; did you mean num_generations?"),
        (["objective.epsilonn=1e-4"], "unknown objective option 'epsilonn'; did you mean epsilon?"),
        (["transition.noise_levl=1"], "unknown transition option 'noise_levl'; did you mean noise_level?"),
        (["objective=gpro"], "unknown objective 'gpro'; did you mean grpo?"),
        (["steps=windw"], "unknown steps 'windw'; did you mean window?"),
        (["steps=window", "steps.size=9"], "steps: Window size=9 does not fit"),
        (["rewards.brightnes=1"], "rewards.brightnes: unknown reward 'brightnes'; did you mean brightness?"),
        (["rewards.no_such_module.f=1"], "rewards.no_such_module.f: reward 'no_such_module.f': cannot import no_such_module"),
        (["rewards.os.getcwdd=1"], "os has no function or class getcwdd"),
        (["rewards.brightness=heavy"], "rewards.brightness: the weight 'heavy' is not a number"),
        (["rewards.brightness=.nan"], "rewards.brightness: the weight nan is not a finite number"),
        (["eval_rewards.jpg_size=1"], "eval_rewards.jpg_size: unknown reward 'jpg_size'; did you mean jpeg_size?"),
        (["num_generations=1"], "num_generations=1: a group of one has no advantage"),
        (["transition=ode"], "grpo needs a stochastic sampler, ODE() is deterministic: choose flow_sde, cps"),
        (["transition.noise_level=0"], "grpo needs a stochastic sampler, CPS(noise_level=0.0) is deterministic"),
        (["batch_size=3"], "batch_size=3 does not divide the 4 images of an update"),
        (["batch_size=3"], "use 1, 2, 4"),
        (["updates_per_step=3"], "prompts_per_step=2 does not divide over 1 process(es) x updates_per_step=3; use 3"),
        (["prompts_per_step=5"], "prompts_per_step=5 exceeds the 4 prompts of"),
        (["prompts_by=colour"], "prompts_by=colour: no prompt has this column; columns: none"),
        (["prompts={tmp}/nowhere.txt"], "no prompt file at {tmp}/nowhere.txt"),
        (["prompts={tmp}/empty.txt"], "{tmp}/empty.txt has no prompts in it"),
        (["prompts={tmp}/broken.jsonl"], "{tmp}/broken.jsonl, line 2: not valid JSON"),
        (["prompts={tmp}/latin.txt"], "{tmp}/latin.txt is not UTF-8 text (byte 1)"),
        (["model={tmp}/nowhere"], "no model at {tmp}/nowhere; embedded models: tiny-sd3"),
        (["model=tiny-sd4"], "no model at tiny-sd4; embedded models: tiny-sd3"),
        (["model={tmp}/no-index"], "{tmp}/no-index is not a diffusers pipeline: it has no model_index.json"),
        (["model={tmp}/no-weights"], "{tmp}/no-weights has no safetensors weights for: transformer, vae"),
        (["lora={tmp}/no-index"], "lora: there is no pytorch_lora_weights.safetensors in {tmp}/no-index"),
        (["lora={tmp}/nowhere"], "lora: there is no folder {tmp}/nowhere"),
        (["resume_from_checkpoint=latest"], "resume_from_checkpoint=latest: no checkpoint in {tmp}/run"),
        (["resume_from_checkpoint={tmp}"], "resume_from_checkpoint: {tmp} is not a checkpoint of flowrl"),
        (["report_to=tensorbord"], "report_to='tensorbord': choose among"),
        (["autocast=int8"], "autocast='int8': choose one of bfloat16"),
    ],
)
def test_train_refuses_before_it_writes_anything(capsys, tmp_path, recipe, overrides, message):
    """One line that names the option and the fix, exit code 2, and no output folder: no weight was loaded either."""
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": b}\n')
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "no-index").mkdir()
    (tmp_path / "no-weights").mkdir()
    index = {"_class_name": "StableDiffusion3Pipeline"} | {
        name: ["diffusers", "X"] for name in ("transformer", "vae", "scheduler")
    }
    (tmp_path / "no-weights" / "model_index.json").write_text(json.dumps(index))
    overrides = [override.format(tmp=tmp_path) for override in overrides]
    line = refused(capsys, "train", recipe, f"output_dir={tmp_path}/run", *overrides)
    assert message.format(tmp=tmp_path) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lora_targets=[to_qq]"], "lora_targets ['to_qq'] match nothing in SD3Transformer2DModel; its linear layers end"),
        (["call.negative_promt=blurry"], "of StableDiffusion3Pipeline 'negative_promt'; did you mean negative_prompt"),
        (["num_frames=5"], "num_frames=5: StableDiffusion3Pipeline draws pictures; leave it out"),
        (["call.prompt=a cat"], "unknown argument (or one that training sets itself) of StableDiffusion3Pipeline 'prompt'"),
        (["attention_backend=nativ"], "attention_backend=nativ: unknown backend; choose from "),
        (["height=30"], "`height` and `width` have to be divisible by 4"),
        (["model=nobody-here/nothing-there"], "nobody-here/nothing-there"),
    ],
)
def test_what_only_the_model_can_tell(capsys, tmp_path, recipe, model, overrides, message):
    """Refused when the model is there to ask: the folder holds no metrics, so the next try may use it."""
    overrides = [override.format(model=model) for override in overrides]
    line = refused(capsys, "train", recipe, f"output_dir={tmp_path}/run", *overrides)
    assert message in line
    assert not {"metrics.jsonl", "checkpoint-1"} & {path.name for path in (tmp_path / "run").rglob("*")}
    assert not list(tmp_path.rglob(".writing-*"))


def test_output_folders_that_cannot_be_used(capsys, tmp_path, recipe):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(capsys, "train", recipe, f"output_dir={tmp_path}/file")
    line = refused(capsys, "train", recipe, f"output_dir={tmp_path}/file/run")
    assert line.endswith("file/run cannot be written: Not a directory")
    assert "/proc/run cannot be written" in refused(capsys, "train", recipe, "output_dir=/proc/run")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_not_overwritten(capsys, tmp_path, recipe):
    """A second run in the same folder is refused, and so are checkpoints that do not fit."""
    folder = tmp_path / "run"
    assert main(["train", str(recipe), f"output_dir={folder}", "max_steps=1"]) == 0
    metrics = (folder / "metrics.jsonl").read_bytes()
    assert "holds a run already" in refused(capsys, "train", recipe, f"output_dir={folder}", "max_steps=1")
    going_on = ("train", recipe, f"output_dir={folder}", "resume_from_checkpoint=latest")
    assert "was trained with lora_rank=2, this recipe says 4" in refused(capsys, *going_on, "lora_rank=4")
    assert "was trained with model=" in refused(capsys, *going_on, "model=tiny-sd3")
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert len(checkpoints(folder)) == 1


def test_a_checkpoint_of_a_model_that_changed_meanwhile(capsys, tmp_path, recipe, model):
    """Same name, other weights: fewer layers."""
    from tests.pipelines import tiny

    pipe = tiny("sd3")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[1:]
    pipe.transformer.register_to_config(num_layers=1)
    folder = tmp_path / "run"
    moving = tmp_path / "model"
    moving.symlink_to(model)
    argv = ("train", str(recipe), f"model={moving}", f"output_dir={folder}")
    assert main([*argv, "max_steps=1"]) == 0
    moving.unlink()
    pipe.save_pretrained(moving)
    line = refused(capsys, *argv, "max_steps=2", "resume_from_checkpoint=latest")
    assert "checkpoint-1 is of another model:" in line and "weights differ in name or shape" in line


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("short", r"reward 'short' returned values of shape (1,) for 4 samples"),
        ("text", "reward 'text' returned list instead of one number (or None) per sample"),
        ("infinite", "reward 'infinite' returned infinity for sample 0"),
        ("silent", "reward 'own_rewards.silent' abstained (NaN) on every sample of step 1: does it fit these prompts?"),
        ("constant", "reward 'own_rewards.constant' gave 0.25 to all 4 samples of the first rollout"),
        ("broken", "reward 'own_rewards.broken' raised ValueError: no scorer at this address (FLOWRL_TRACEBACK=1"),
        ("broken_later", "reward 'own_rewards.broken_later' raised ConnectionError: the scorer went away"),
    ],
)
def test_rewards_that_break_their_contract_are_named(capsys, tmp_path, recipe, own_rewards, reward, message):
    """The line names the reward; with the reward put right, the same command then works in the same folder."""
    command = ["train", str(recipe), f"output_dir={tmp_path}/run", "max_steps=2", "rewards.brightness=null"]
    assert message in refused(capsys, *command, f"rewards.own_rewards.{reward}=1")
    assert not checkpoints(tmp_path / "run")
    if reward != "broken_later":  # that run got as far as a first row of metrics
        assert main([*command, "rewards.own_rewards.red=1"]) == 0
        assert "rewards/own_rewards.red/mean" in read_metrics(tmp_path / "run")[-1]


def test_tracebacks_on_request(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("FLOWRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="num_generations=1"):
        main(["train", str(recipe), f"output_dir={tmp_path}/run", "num_generations=1"])


# ------------------------------------------------------------------------------------------------ a full disk


def test_a_file_that_grows_too_large_during_a_checkpoint(tmp_path, recipe):
    """The disk takes the first checkpoint's small files and refuses one: a line that names it, nothing half-written."""
    command = ["train", recipe, f"output_dir={tmp_path}/run", "checkpointing_steps=1", "lora_rank=64", "max_steps=2"]
    done = run(command, tmp_path / "log", file_limit=200_000)
    assert done.code == 2
    assert done.err.splitlines()[-1].startswith(f"flowrl: {tmp_path}/run/checkpoint-1 cannot be written: ")
    assert "File too large" in done.err.splitlines()[-1] and "Traceback" not in done.err
    assert checkpoints(tmp_path / "run") == [] and not list(tmp_path.rglob(".writing-*"))


def test_a_full_disk_during_a_later_checkpoint(tmp_path, recipe):
    """On a file system of 900 kB two checkpoints fit and a third does not: the second stays, whole, and with more room the
    run goes on from it."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", small], check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    command = ["train", recipe, f"output_dir={small}/run", "checkpointing_steps=1", "lora_rank=16", "max_steps=4"]
    try:
        done = run(command, tmp_path / "log")
        assert done.code == 2
        last = done.err.splitlines()[-1]
        assert "No space left on device" in last
        kept = checkpoints(small / "run")
        assert kept and last.startswith(f"flowrl: {small}/run/checkpoint-{len(kept) + 1} ")
        assert not list(small.rglob(".writing-*"))
        subprocess.run(["mount", "-o", "remount,size=50m", small], check=True)
        done = run([*command, "resume_from_checkpoint=latest"], tmp_path / "log")
        assert done.code == 0, done.err
        assert f"resuming from {kept[-1]}" in done.out
        assert [row["step"] for row in read_metrics(small / "run")] == [1, 2, 3, 4]
    finally:
        subprocess.run(["umount", small], check=True)


# ------------------------------------------------------------------------------------------------ the other commands


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "invalid choice: 'trian'"),
        (["plan", "quickstrat"], "no recipe quickstrat; did you mean quickstart?"),
        (["plan", "quickstart", "num_generations=1"], "num_generations=1"),
        (["plan", "quickstart", "objective.epsilonn=1"], "unknown objective option 'epsilonn'"),
        (["plan", "tiny-grpo", "transition=ode"], "needs a stochastic sampler"),
        (["plan", "tiny-grpo", "steps.size=20"], "steps: Window size=20 does not fit"),
        (["plan", "quickstart", "--processes", "5"], "prompts_per_step=12 does not divide over 5 process(es)"),
        (["plan", "quickstart", "--processes", "0"], "argument --processes: 0 is not a positive whole number"),
        (["eval", "{model}", "--prompts", "nowhere.txt"], "no prompt file at nowhere.txt"),
        (["eval", "{model}", "--seeds", "0"], "argument --seeds: 0 is not a positive whole number"),
        (["eval", "{model}", "--steps", "two"], "argument --steps: two is not a positive whole number"),
        (["eval", "{model}", "--batch-size", "-1"], "argument --batch-size: -1 is not a positive whole number"),
        (["eval", "{model}", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["eval", "{model}", "--rewards", "tiny_strictt"], "unknown reward 'tiny_strictt'; did you mean tiny_strict"),
        (["eval", "{model}", "--out", "{tmp}/file/x.json"], "{tmp}/file cannot be made: File exists"),
        (["eval", "{tmp}"], "is not a diffusers pipeline: it has no model_index.json"),
        (["eval", "tiny-sd4"], "no model at tiny-sd4"),
        (["eval"], "the following arguments are required: model (see flowrl eval --help)"),
        (["gallery", "{model}", "--limit", "0"], "argument --limit: 0 is not a positive whole number"),
        (["gallery", "{model}", "--out", "{tmp}/file"], "{tmp}/file is a file"),
        (["gallery", "{model}", "--out", "{tmp}"], "is not empty and is not a gallery"),
        (["sample", "{model}"], "no prompts: give them as arguments"),
        (["sample", "{model}", "a", "--out", "{tmp}/file"], "{tmp}/file cannot be made: File exists"),
        (["sample", "{tmp}/nowhere", "a"], "no model at {tmp}/nowhere"),
    ],
)
def test_other_commands_refuse_in_one_line(capsys, tmp_path, monkeypatch, model, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    line = refused(capsys, *[a.format(model=model, tmp=tmp_path) for a in argv])
    assert message.format(tmp=tmp_path) in line
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_run_that_has_nothing_yet(capsys, tmp_path, recipe):
    from flowrl import load_recipe, record

    record.write_facts(tmp_path, load_recipe(recipe))
    assert "has no result and no checkpoint yet" in refused(capsys, "eval", tmp_path, "--prompts", recipe)


# ------------------------------------------------------------------------------------------------ as installed


def test_the_installed_command_refuses_with_one_line_and_nothing_else(tmp_path, recipe):
    """Nothing but the line on stderr, and that before torch is imported (0.1 s)."""
    done = run_installed("train", recipe, f"output_dir={tmp_path}/run", "learning_rat=1")
    assert (done.code, done.out) == (2, "") and not (tmp_path / "run").exists()
    assert done.err == "flowrl: unknown recipe option 'learning_rat'; did you mean learning_rate?\n"


@pytest.mark.parametrize(("override", "line"), [("transition=ode", "grpo needs"), ("output_dir=/proc/x", "output_dir /proc/x")])
def test_stderr_holds_one_line(tmp_path, recipe, override, line):
    done = run(["train", recipe, f"output_dir={tmp_path}/run", override], tmp_path / "log")
    assert done.code == 2 and done.err.startswith(f"flowrl: {line}") and done.err.count("\n") == 1


def test_train_eval_gallery_and_sample(tmp_path, recipe, model, prompts, own_rewards):
    """The whole way through the installed command: a reward from the folder it is called in, results that open."""
    done = run_installed("train", recipe, "output_dir=run", "rewards.own_rewards.red=1", "max_steps=2", "learning_rate=0.1")
    assert done.code == 0, done.err
    assert "images per step" in done.out and "Done: run" in done.out and "Traceback" not in done.err
    assert "Warning" not in done.err, done.err

    sampling = ["--prompts", prompts, "--steps", "2", "--seeds", "2"]
    argv = ["eval", "run", "--against", model, "--rewards", "own_rewards.red", "brightness", "--out", "deep/e.json", *sampling]
    done = run(argv, tmp_path / "log")
    assert done.code == 0, done.err
    assert "95 % interval" in done.out and "own_rewards.red" in done.out
    tuned, base = json.loads(Path("deep/e.json").read_text())["results"]
    assert len(tuned["samples"]) == len(base["samples"]) == 8
    assert [row["seed"] for row in tuned["samples"]] == [row["seed"] for row in base["samples"]]
    assert [row["rewards"] for row in tuned["samples"]] != [row["rewards"] for row in base["samples"]]

    argv = ["gallery", model, "run", f"{model}+run@0.5", "--rewards", "brightness", "--out", "pages/g", *sampling]
    done = run(argv, tmp_path / "log")
    assert done.code == 0, done.err
    page = Path("pages/g/index.html").read_text()
    assert (
        "a red circle" in page
        and "sd3+run@0.5" in page
        and "flowrl sample run 'a red circle' --seed " in page.replace("\\u0027", "'")
    )

    argv = ["sample", model, "a cat", "--against", "run", f"{model}+run@0.5", "--steps", "2", "--seeds", "2"]
    done = run([*argv, "--rewards", "own_rewards.red", "--grid", "--out", "pictures"], tmp_path / "log")
    assert done.code == 0, done.err
    assert "6 pictures in pictures" in done.out and "Warning" not in done.err
    rows = [json.loads(line) for line in Path("pictures/samples.jsonl").read_text().splitlines()]
    assert [row["file"].split("/")[0] for row in rows] == ["sd3", "sd3", "run", "run", "sd3-run-0.5", "sd3-run-0.5"]
    assert all(Image.open(f"pictures/{row['file']}").size == (32, 32) for row in rows)
    assert Path("pictures/grid.png").is_file()


def test_plan_and_recipes(capsys):
    for words in (
        ["prompts_per_step=4", "--no-memory", "num_generations=6"],
        ["--no-memory", "prompts_per_step=4", "num_generations=6"],
    ):
        assert main(["plan", "quickstart", *words]) == 0  # options stand anywhere
        assert "24 = 4 prompts x 6 generations" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    generators, rewards = capsys.readouterr().out.split("flowrl train-reward\n")
    assert generators.startswith("flowrl train\n  quickstart ") and "  tiny-preference " in rewards


def test_the_executable_is_where_the_tests_call_it():
    assert FLOWRL.is_file()


@pytest.mark.parametrize(("processes", "spins"), [(1, "10000"), (2, "0"), (5, "0")])
def test_threads_spin_on_an_idle_machine_only(monkeypatch, processes, spins):
    """The count of what runs includes the process that asks."""
    monkeypatch.setattr("flowrl.cli.Path", lambda name: SimpleNamespace(read_text=lambda: f"0.1 0.2 0.3 {processes}/210 12345\n"))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr("os.environ", dict(os.environ, GOMP_SPINCOUNT="7"))
    set_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    del os.environ["GOMP_SPINCOUNT"]
    set_spinning()
    assert os.environ.pop("GOMP_SPINCOUNT") == spins
    os.environ["OMP_WAIT_POLICY"] = "ACTIVE"
    set_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ
