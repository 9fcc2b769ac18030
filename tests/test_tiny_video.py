"""The embedded world of clips: grammar, verifier, and the build of its pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flowrl import tiny
from flowrl.cli import main
from flowrl.commands.common import CLIPS, PICTURES, world_of
from flowrl.policy import LORA_FILE, Policy
from flowrl.tiny import build, evaluate, stages, video
from flowrl.tiny.follow import PARTS, follow, parts
from flowrl.tiny.moves import (
    DIRECTIONS,
    FRAMES,
    KINDS,
    SIDE,
    TEST_PER_KIND,
    Clip,
    Moving,
    all_specs,
    random_spec,
    render_clip,
    sample_clip,
    split,
)


def item(shape="circle", color=None, moves=None, speed=None, size=None):
    return {"shape": shape, "color": color, "count": 1, "moves": moves, "speed": speed, "size": size}


def clip(*objects):
    """(1, F, 3, H, W)."""
    return torch.from_numpy(render_clip(Clip(objects)))[None]


def circle(start=(24.0, 24.0), step=(0.0, 0.0), sides=(15.0, 15.0), color="red", shape="circle"):
    return Moving(shape, color, start, step, sides)


def read(shown, *items):
    return dict(zip(PARTS, parts(shown, [{"include": list(items)}])[0].tolist(), strict=True))


# ------------------------------------------------------------------------------------------------ grammar


def test_splits_are_disjoint_and_hold_every_kind():
    train, test = split("train"), split("test")
    prompts = [spec["prompt"] for spec in all_specs()]
    assert len(set(prompts)) == len(prompts)
    assert not {s["prompt"] for s in train} & {s["prompt"] for s in test}
    assert {s["prompt"] for s in train + test} <= set(prompts)
    seen = [json.dumps(s["include"], sort_keys=True) for s in train]
    assert not {json.dumps(s["include"], sort_keys=True) for s in test} & set(seen)  # no wording of a held-out scene either
    for kind in KINDS:
        assert sum(s["kind"] == kind for s in test) == TEST_PER_KIND <= sum(s["kind"] == kind for s in train)


def test_prompt_files_are_the_splits():
    for name in ("train", "test"):
        lines = tiny.prompts_path(f"video-{name}").read_text().splitlines()
        assert [json.loads(line) for line in lines] == split(name)


@pytest.mark.parametrize("kind", KINDS)
def test_clips_lie_inside_and_agree_with_their_captions(kind):
    rng = np.random.default_rng(0)
    for _ in range(20):
        spec = random_spec(rng, "train", {kind: 1.0})
        made = sample_clip(spec, rng)
        for scene in made.scenes():
            assert all(o.size / 2 <= min(o.cx, o.cy) and max(o.cx, o.cy) <= SIDE - o.size / 2 for o in scene.objects)
        for wanted, moving in zip(spec["include"], made.objects, strict=True):
            way = np.array(DIRECTIONS.get(wanted["moves"], (0, 0)))
            assert np.allclose(moving.step, way * np.hypot(*moving.step))
            assert (moving.sides[1] > moving.sides[0]) == (wanted["size"] == "growing")


def test_frames_of_a_clip_share_their_colours():
    shown = render_clip(Clip((circle(),)), np.random.default_rng(3))
    assert shown.shape == (FRAMES, 3, SIDE, SIDE) and all(np.array_equal(shown[0], frame) for frame in shown)


# ------------------------------------------------------------------------------------------------ verifier


def test_the_truth_is_accepted_and_another_caption_is_not():
    """Its own error on rendered truth is 0.2 % over 1,200 clips; here 120 of them."""
    rng = np.random.default_rng(1)
    specs = [random_spec(rng, "test", {kind: 1.0}) for kind in KINDS for _ in range(20)]
    shown = torch.from_numpy(np.stack([render_clip(sample_clip(spec, rng), rng) for spec in specs]))
    strict, dense = follow(shown, specs)
    assert strict.mean() >= 0.99 and torch.equal(dense == 1, strict == 1)
    others = specs[7:] + specs[:7]
    wrong = [i for i, (a, b) in enumerate(zip(specs, others, strict=True)) if a["include"] != b["include"]]
    strict, dense = follow(shown[wrong], [others[i] for i in wrong])
    assert strict.mean() <= 0.02 and dense.mean() < 0.6


def test_directions_and_speeds():
    """1 pixel per frame to the left is slow, 2.5 is quick; against the direction counts nothing, across it neither."""
    slow, quick = clip(circle((30, 24), (-1, 0))), clip(circle((36, 24), (-2.5, 0)))
    assert read(slow, item(moves="left", speed="slowly")) == dict.fromkeys(PARTS, 1.0)
    assert read(quick, item(moves="left", speed="quickly")) == dict.fromkeys(PARTS, 1.0)
    assert (
        read(quick, item(moves="left", speed="slowly"))["motion"] < 1
        and read(slow, item(moves="left", speed="quickly"))["motion"] < 1
    )
    for wrong in ("right", "up", "down", "still"):
        assert read(quick, item(moves=wrong))["motion"] < 0.35
    assert read(slow, item(moves="still"))["motion"] < 1


def test_standing_still_is_no_motion():
    still = clip(circle())
    assert read(still, item(moves="still")) == dict.fromkeys(PARTS, 1.0)
    assert all(read(still, item(moves=d))["motion"] < 0.2 for d in DIRECTIONS)


def test_growing_is_told_from_shrinking_and_from_neither():
    grown, shrunk, plain = (clip(circle(sides=sides)) for sides in ((12, 20), (20, 12), (16, 16)))
    assert read(grown, item(size="growing"))["motion"] == read(shrunk, item(size="shrinking"))["motion"] == 1
    assert read(grown, item(size="shrinking"))["motion"] == read(plain, item(size="growing"))["motion"] == 0
    assert read(grown, item(moves="still"))["motion"] == 0.75  # the way is right, the change was not asked for: (1 + 0.5) / 2


def test_a_jump_is_not_smooth():
    """The circle stands at x = 14, and from the middle on at 34: the way is right on average, and strays from its line."""
    jumps = torch.cat([clip(circle((14, 24)))[:, :4], clip(circle((34, 24)))[:, 4:]], 1)
    found = read(jumps, item(moves="right"))
    assert found["smooth"] < 0.3 and found["same"] == 1 and found["object"] == 1


def test_identity_over_time():
    """Red for 6 frames, then blue for 3: the same shapes in 6 of 9. As a red circle it is right in as many."""
    changes = torch.cat([clip(circle())[:, :6], clip(circle(color="blue"))[:, 6:]], 1)
    found = read(changes, item(color="red", moves="still"))
    assert found["same"] == pytest.approx(6 / 9) and found["object"] == pytest.approx(6 / 9) and found["motion"] == 1
    assert read(changes, item(moves="still"))["object"] == 1  # no colour was asked for


def test_surplus_and_missing_shapes():
    both = clip(circle((12, 12)), circle((36, 36), shape="square"))
    assert read(both, item(moves="still"))["object"] == 0.5  # 1 / (1 + one too many)
    assert read(clip(circle()), item(moves="still"), item("square", moves="still"))["object"] == 0.5
    empty = torch.full((1, FRAMES, 3, SIDE, SIDE), 0.94)
    assert read(empty, item(moves="still")) == {"object": 0.0, "motion": 0.0, "smooth": 0.0, "same": 1.0}
    assert follow(empty, [{"include": [item()]}])[0] == 0


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\(N, F, 3, H, W\), not \(1, 3, 48, 48\)"):
        parts(torch.zeros(1, 3, 48, 48), [{}])
    with pytest.raises(ValueError, match="1 clips but 2 specs"):
        parts(torch.zeros(1, 9, 3, 48, 48), [{}, {}])
    with pytest.raises(ValueError, match="'valid'"):
        split("valid")


# ------------------------------------------------------------------------------------------------ shipped model


@pytest.fixture(scope="module")
def pipe():
    return video.load(tiny.model_path("tiny-wan"))


def test_assets_are_small_and_safe():
    files = [f for f in tiny.model_path("tiny-wan").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 20e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md"}
    assert sum(f.stat().st_size for f in tiny.model_path("tiny-wan").parent.rglob("*") if f.is_file()) < 60e6  # of everything


def test_shipped_pipeline_samples_deterministically(pipe):
    prompts = [spec["prompt"] for spec in split("test")[::20]]
    defaults = json.loads((tiny.model_path("tiny-wan") / "flowrl.json").read_text())
    assert defaults == {"call": video.CALL, "fps": video.FPS}
    first, again = (evaluate.sample(pipe, prompts, range(5), num_inference_steps=6) for _ in range(2))
    assert first.shape == (5, FRAMES, 3, SIDE, SIDE)
    assert torch.equal(first, again)
    alone = evaluate.sample(pipe, prompts[:1], [0], num_inference_steps=6)
    assert torch.allclose(alone[0], first[0], atol=1e-3)  # batch mates change the rounding and nothing else
    assert not torch.allclose(first, evaluate.sample(pipe, prompts, range(1, 6), num_inference_steps=6), atol=0.1)


def test_shipped_pipeline_is_good_but_not_perfect(pipe):
    result = evaluate.scores(pipe, split("test")[::3], seeds=1, batch=32)
    assert 0.3 < result["overall"] < 0.85
    assert result["dense"] > result["overall"]


def test_vae_reconstructs_what_moves(pipe):
    assert evaluate.ceiling(pipe, 100) >= 0.8


# ------------------------------------------------------------------------------------------------ build


def test_what_only_the_clips_build_sets_reaches_it(monkeypatch, tmp_path):
    built = []
    monkeypatch.setattr(build, "build", built.append)
    build.main(["--video", "--vae-steps", "7", "--prompts", str(tmp_path)])
    build.main(["--prompts", str(tmp_path)])
    assert (built[0].world, built[0].vae_emphasis, built[0].vae_stills, built[0].vae_steps) == ("video", 4.0, 1200, 7)
    assert (built[1].world, built[1].vae_emphasis, built[1].vae_stills, built[1].bf16) == ("pictures", 0.0, 0, True)


def test_stills_are_frames_of_different_clips():
    """The stills of a seed are frames of the clips of that seed, at a place that differs from one to the next."""
    clips, _ = video.draw(np.random.default_rng(3), 6, "train", video.KIND_WEIGHTS)
    frames = video.stills(np.random.default_rng(3), 6)
    assert frames.shape == (6, 3, 1, SIDE, SIDE)
    places = [
        {k for k in range(FRAMES) if np.array_equal(clip[:, k], frame[:, 0])} for clip, frame in zip(clips, frames, strict=True)
    ]
    assert all(places) and len({frozenset(place) for place in places}) > 1


def test_the_build_makes_a_pipeline_that_the_policy_drives(tmp_path):
    arch = video.Architecture(vae_width=4, vae_widening=(1, 1, 1), layers=2, heads=2, head_dim=24, text_width=48, text_layers=1)
    settings = stages.Settings(
        out=tmp_path / "model",
        work=tmp_path / "work",
        world="video",
        steps=2,
        vae_steps=2,
        vae_stills=1,
        vae_batch=2,
        pool=8,
        batch=4,
        device="cpu",
        checkpoint_every=0,
        test_seeds=0,
        arch=arch,
    )
    out = build.build(settings)
    pipe = video.load(out)
    assert pipe.tokenizer("a red circle moving left").input_ids[-1] == pipe.tokenizer.eos_token_id
    known = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer("a red zebra").input_ids)
    assert known == ["a", "red", "<unk>", "</s>"]
    assert max(len(pipe.tokenizer(spec["prompt"]).input_ids) for spec in all_specs()) < video.MAX_TOKENS
    assert evaluate.sample(pipe, ["a red circle moving left"], [0], num_inference_steps=2).shape == (1, FRAMES, 3, SIDE, SIDE)
    z = torch.load(settings.work / "latents.pt", weights_only=True)["z"].float()
    torch.testing.assert_close(z.mean((0, 2, 3, 4)), torch.zeros(12), atol=2e-2, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3, 4)), torch.ones(12), atol=5e-2, rtol=0)
    policy = Policy.load(out, num_inference_steps=2)
    samples = policy.rollout(["a red circle moving left"] * 2, seeds=[0, 1])
    assert policy.decode(samples).shape == (2, FRAMES, 3, SIDE, SIDE)
    assert "text-to-video" in (out / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ where nothing is said


def test_models_of_clips_are_drawn_and_scored_in_their_own_world(tmp_path, capsys):
    """`flowrl eval tiny-wan` takes prompts and rewards of clips; a run on it, too; a mixture with another model does not."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: tiny-wan\n")
    (run / LORA_FILE).touch()
    assert world_of(["tiny-wan", str(run)]) == CLIPS
    assert world_of(["tiny-wan", "tiny-sd3"]) == world_of([]) == PICTURES
    assert main(["eval", "tiny-wan", "--limit", "2", "--seeds", "1", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 prompts: tiny-video-test" in said and "tiny_video_strict" in said and "tiny_video_dense" in said
