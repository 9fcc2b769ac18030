"""The embedded world: grammar, verifier, shipped pipeline, and the program that made it."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from flowrl import tiny
from flowrl.tiny import build, evaluate, models, stages
from flowrl.tiny.scenes import TEST_PER_KIND, Object, Scene


def _draw(specs, seed=0):
    """Scenes and pictures (N, 3, 64, 64) of the specs."""
    rng = np.random.default_rng(seed)
    scenes = [tiny.sample_scene(spec, rng) for spec in specs]
    return scenes, torch.from_numpy(tiny.render_batch(scenes, rng))


def _of_kind(kind, count, seed=0):
    rng = np.random.default_rng(seed)
    return [tiny.random_spec(rng, "test", {kind: 1.0}) for _ in range(count)]


# ------------------------------------------------------------------------------------------------------------- grammar


def test_splits_are_disjoint_and_hold_every_kind():
    train, test = tiny.split("train"), tiny.split("test")
    everything = {spec["prompt"] for spec in tiny.all_specs()}
    assert len(everything) == len(tiny.all_specs())
    assert not {s["prompt"] for s in train} & {s["prompt"] for s in test}
    assert {s["prompt"] for s in train + test} <= everything
    assert 300 <= len(train) <= 600
    for kind in tiny.KINDS:
        assert sum(s["kind"] == kind for s in test) == TEST_PER_KIND
        assert sum(s["kind"] == kind for s in train) >= TEST_PER_KIND


@pytest.mark.parametrize("kind", ["two_object", "colors", "position", "counting", "color_attr"])
def test_combinations_not_only_sentences_are_held_out(kind):
    def combination(spec):
        items = [json.dumps(item, sort_keys=True) for item in spec["include"]]
        return tuple(items if kind != "two_object" else sorted(items)), spec["relation"]

    seen = {combination(s) for s in tiny.split("train") if s["kind"] == kind}
    assert not seen & {combination(s) for s in tiny.split("test") if s["kind"] == kind}


def test_prompt_files_are_the_splits():
    for name in ("train", "test"):
        lines = tiny.prompts_path(name).read_text().splitlines()
        assert [json.loads(line) for line in lines] == tiny.split(name)


def test_scene_agrees_with_its_caption():
    rng = np.random.default_rng(0)
    for spec in tiny.all_specs():
        scene = tiny.sample_scene(spec, rng)
        wanted = [(i["shape"], i["color"]) for i in spec["include"] for _ in range(i["count"])]
        assert len(scene.objects) == len(wanted)
        for obj, (shape, color) in zip(scene.objects, wanted, strict=True):
            assert obj.shape == shape
            assert color in (None, obj.color)
            assert obj.size / 2 <= min(obj.cx, obj.cy, 64 - obj.cx, 64 - obj.cy)
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.cx - b.cx), abs(a.cy - b.cy)) >= (a.size + b.size) / 2 + 3


def test_import_is_cheap():
    code = "import sys, flowrl.tiny; flowrl.tiny.split('test'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------------ verifier


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_verifier_accepts_the_truth(kind):
    specs = _of_kind(kind, 400)
    strict, dense = tiny.verify(_draw(specs)[1], specs)
    assert strict.mean() > 0.995
    assert torch.equal(strict == 1, dense == 1)


def test_detect_reads_what_was_drawn():
    scenes, images = _draw(_of_kind("color_attr", 50))
    for scene, image in zip(scenes, images, strict=True):
        found = {d.shape: d for d in tiny.detect(image)}
        assert set(found) == {o.shape for o in scene.objects}
        for obj in scene.objects:
            assert found[obj.shape].color == obj.color
            assert np.allclose(found[obj.shape].center, (obj.cx, obj.cy), atol=1.5)
            assert 0.74 <= found[obj.shape].score <= 1


def test_swapped_colours_fail():
    specs = _of_kind("color_attr", 200)
    _, images = _draw(specs)
    swapped = []
    for spec in specs:
        a, b = spec["include"]
        swapped.append({**spec, "include": [{**a, "color": b["color"]}, {**b, "color": a["color"]}]})
    strict, dense = tiny.verify(images, swapped)
    assert strict.sum() == 0
    # Both shapes and nothing else (1, 1, 1), both colours wrong (0, 0).
    assert torch.allclose(dense, torch.full_like(dense, 0.6))


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_extra_object_fails(kind):
    specs = _of_kind(kind, 300)
    rng = np.random.default_rng(1)
    changed, kept = [], []
    for spec, scene in zip(specs, _draw(specs)[0], strict=True):
        shape, color = rng.choice(tiny.SHAPES), rng.choice(list(tiny.COLORS))
        for x, y in itertools.product(range(10, 55, 4), repeat=2):
            if all(max(abs(o.cx - x), abs(o.cy - y)) > o.size / 2 + 11 for o in scene.objects):
                extra = Object(str(shape), str(color), x, y, 16)
                changed.append(dataclasses.replace(scene, objects=(*scene.objects, extra)))
                kept.append(spec)
                break
    assert len(kept) > 100
    strict, dense = tiny.verify(tiny.render_batch(changed), kept)
    assert strict.sum() == 0
    assert dense.max() < 1


def test_a_missing_object_and_an_empty_picture_fail():
    specs = _of_kind("counting", 200)
    scenes, _ = _draw(specs)
    fewer = tiny.render_batch([dataclasses.replace(s, objects=s.objects[1:]) for s in scenes])
    strict, dense = tiny.verify(fewer, specs)
    assert strict.sum() == 0
    assert (dense > 0.4).all()
    strict, dense = tiny.verify(tiny.render_batch([Scene(())] * 200), specs)
    assert strict.sum() == 0
    assert dense.max() < 0.7


def test_mirrored_position_fails():
    specs = _of_kind("position", 200)
    _, images = _draw(specs)
    axis = [3 if spec["relation"] in ("left of", "right of") else 2 for spec in specs]
    mirrored = torch.stack([image.flip(a - 1) for image, a in zip(images, axis, strict=True)])
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert tiny.verify(mirrored, specs)[0].sum() == 0
    turned = [{**spec, "relation": opposite[spec["relation"]]} for spec in specs]
    assert tiny.verify(images, turned)[0].sum() == 0
    # Mirrored pictures fulfil the opposite relation wherever the mirror keeps the shape (a triangle has an upright).
    upright = [all(i["shape"] not in ("triangle", "star") for i in spec["include"]) for spec in specs]
    strict = tiny.verify(mirrored, turned)[0]
    assert strict[torch.tensor(upright)].min() == 1


def test_noise_and_blobs_are_no_objects():
    g = torch.Generator().manual_seed(0)
    specs = _of_kind("single_object", 64)
    assert tiny.verify(torch.rand(64, 3, 64, 64, generator=g), specs)[0].sum() == 0
    assert tiny.verify(torch.full((64, 3, 64, 64), float("nan")), specs)[0].sum() == 0
    assert [d.shape for d in tiny.detect(torch.zeros(3, 64, 64))] == ["unknown"]  # and not a large black square
    bar = np.full((3, 64, 64), 0.94, np.float32)
    bar[:, 30:36, 10:50] = 0.08
    assert [d.shape for d in tiny.detect(bar)] == ["unknown"]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="2 pictures but 1 specs"):
        tiny.verify(torch.zeros(2, 3, 64, 64), tiny.split("test")[:1])
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        tiny.verify(torch.zeros(1, 64, 64), tiny.split("test")[:1])
    with pytest.raises(ValueError, match="'validation'"):
        tiny.split("validation")


# -------------------------------------------------------------------------------------------------------- shipped model


@pytest.fixture(scope="module")
def pipe():
    return models.load(tiny.model_path())


def test_assets_are_small_and_safe():
    files = [f for f in tiny.model_path().rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 25e6
    assert {f.suffix for f in files} <= {".safetensors", ".json", ".md", ".txt"}
    assert sum(f.suffix == ".safetensors" for f in files) == 4


def test_shipped_pipeline_samples_deterministically(pipe):
    prompts = [spec["prompt"] for spec in tiny.split("test")[::20]]
    call = json.loads((tiny.model_path() / "flowrl.json").read_text())["call"]
    assert call == models.CALL
    first, again = (evaluate.sample(pipe, prompts, range(6)) for _ in range(2))
    assert first.shape == (6, 3, 64, 64)
    assert torch.equal(first, again)
    alone = evaluate.sample(pipe, prompts[:1], [0])
    assert torch.allclose(alone[0], first[0], atol=1e-3)  # batch mates change the rounding and nothing else
    assert not torch.allclose(first, evaluate.sample(pipe, prompts, range(1, 7)), atol=0.1)


def test_shipped_pipeline_is_good_but_not_perfect(pipe):
    specs = tiny.split("test")[::3]
    result = evaluate.scores(pipe, specs, seeds=1, batch=60)
    assert 0.3 < result["overall"] < 0.85
    assert result["dense"] > result["overall"]


def test_every_word_is_one_token_after_reload(pipe):
    fresh = models.make_tokenizer()
    words = {word for spec in tiny.all_specs() for word in spec["prompt"].split()}
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        ids = {word: tokenizer(word).input_ids for word in words}
        assert all(len(i) == 3 for i in ids.values())
        assert len({i[1] for i in ids.values()}) == len(words)
        assert ids == {word: fresh(word).input_ids for word in words}
        assert tokenizer.model_max_length == models.MAX_TOKENS
        assert tokenizer("zebra é").input_ids[1:-1]  # bytes: no unknown token
        assert max(len(tokenizer(s["prompt"]).input_ids) for s in tiny.all_specs()) < models.MAX_TOKENS


def test_pooled_embedding_is_read_at_the_end_of_the_caption(pipe):
    """The default eos_token_id of the config would read the start token, which is the same for all captions."""
    context, pooled = models.encode(pipe, ["a red circle", "a blue circle", "a red circle"])
    assert torch.equal(pooled[0], pooled[2])
    assert (pooled[0] - pooled[1]).abs().max() > 0.1
    assert context.shape == (3, models.MAX_TOKENS + 1, sum(models.Architecture().text_widths))
    assert pooled.requires_grad  # the conditioning path of the training is that of the pipeline


def test_vae_reconstructs(pipe):
    assert evaluate.ceiling(pipe, 100) >= 0.95


# ---------------------------------------------------------------------------------------------------------------- build


def _micro(tmp_path, **changes):
    arch = models.Architecture(vae_channels=(8, 8, 8, 8), layers=2, heads=2, head_dim=16, text_widths=(32, 32))
    settings = stages.Settings(
        out=tmp_path / "model",
        work=tmp_path / "work",
        steps=3,
        vae_steps=2,
        vae_batch=2,
        pool=16,
        batch=4,
        device="cpu",
        checkpoint_every=0,
        test_seeds=0,
        arch=arch,
    )
    return dataclasses.replace(settings, **changes)


def test_build_resumes_where_it_was_killed(tmp_path):
    """Killed in the VAE, after the latents and between two steps of the transformer: the same weights as in one go."""
    whole = build.build(_micro(tmp_path / "whole"))
    broken = _micro(tmp_path / "broken")

    class Killed(Exception):
        pass

    def killing(path_name, count):
        saves = itertools.count(1)

        def save(state, path):
            real(state, path)
            if path.name == path_name and next(saves) == count:
                raise Killed

        return save

    real = stages._save
    for name, count in (("vae.pt", 1), ("latents.pt", 1), ("transformer.pt", 1)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stages, "_save", killing(name, count))
            with pytest.raises(Killed):
                build.build(broken)
    out = build.build(broken)
    assert not list(tmp_path.rglob("*.part"))
    one, two = (models.load(folder) for folder in (whole, out))
    for part in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        a, b = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a), part
    assert one.vae.config.scaling_factor == two.vae.config.scaling_factor != 1.0
    assert evaluate.sample(two, ["a red circle"], [0], num_inference_steps=2).shape == (1, 3, 64, 64)
    assert (out / "flowrl.json").exists()
    assert "preliminary" in (out / "README.md").read_text()


def test_build_help_teaches():
    with pytest.raises(SystemExit) as done:
        build.main(["--help"])
    assert done.value.code == 0
