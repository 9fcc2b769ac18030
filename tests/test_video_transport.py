"""Clips and texts in one space: encoders of frames and of sheets, PISCES with a price on time, and what trains them."""

from __future__ import annotations

import json
import math

import numpy as np
import ot
import pytest
import torch
from torch.nn import functional as F

from flowrl.batch import Prompt, Samples
from flowrl.config import ConfigError
from flowrl.reward_models import RewardError, load_reward, score
from flowrl.reward_models.base import score_one, to_pil
from flowrl.reward_models.features import load_backbone
from flowrl.reward_models.transport import places, token_cost, token_plan
from flowrl.reward_models.video_text import FramesEncoder, SheetEncoder, clip_encoder, spread
from flowrl.tiny.clip_captions import captioned_clips, neighbours, shows, word_tests
from flowrl.tiny.follow import follow
from flowrl.tiny.moves import Clip, Moving, random_spec, render_clip, sample_clip, split
from flowrl.train.rewards.loop import RewardTrainer, load_reward_recipe
from flowrl.train.rewards.video_contrastive import tiny_video_clip

EPSILON = 0.05


def clips(count: int = 2, frames: int = 9, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    specs = [random_spec(rng, "test", {"color": 1.0}) for _ in range(count)]
    return torch.from_numpy(np.stack([render_clip(sample_clip(s, rng), rng)[:frames] for s in specs]))


def made(images: torch.Tensor, texts: tuple[str, ...] = ("a red circle", "two blue stars")) -> Samples:
    n = len(images)
    return Samples([Prompt(text) for text in texts[:n]], list(range(n)), torch.arange(n), torch.zeros(n, 1), images)


@pytest.fixture(scope="module")
def sheet() -> SheetEncoder:
    torch.manual_seed(0)
    return tiny_video_clip(32, 1, 32, 1, 16, side=16).requires_grad_(False).eval()


# ------------------------------------------------------------------------------------------------ time in the plan


def test_a_word_that_happens_early_costs_more_at_late_frames():
    """Four frames of 2 x 2 patches. The first word fits all of frame 0 and, as well, one patch of frame 3; the second fits
    everywhere a little. With a price on time the late patch is left; without it, it is taken like the others."""
    S = torch.zeros(1, 2, 16)
    S[0, 0, [0, 1, 2, 3, 12]] = 0.9
    S[0, 1] = 0.5
    mask, late = torch.ones(1, 2, dtype=torch.bool), 12
    where, times = places(2, 2).repeat(4, 1), torch.linspace(0, 1, 4).repeat_interleave(4)
    plans = [token_plan(S, mask, where, mass=0.25, eta=0, times=times, gamma=gamma)[0, 0] for gamma in (0.0, 0.5)]
    without, held = plans
    torch.testing.assert_close(without[late], without[0])
    assert float(held[late]) < 0.3 * float(without[late]) and float(held[0]) > float(without[0])


def test_the_cost_is_the_papers_and_the_plan_is_pots():
    """C = [1 - S] + gamma |tau - t| + eta |pi - s| with tau, pi from a first plan, all scaled to [0, 1]; solved by POT."""
    g = torch.Generator().manual_seed(0)
    S, mask = torch.rand(1, 5, 24, generator=g), torch.ones(1, 5, dtype=torch.bool)
    where, times = places(2, 3).repeat(4, 1), torch.linspace(0, 1, 4).repeat_interleave(6)

    def scaled(x: np.ndarray) -> np.ndarray:
        return (x - x.min()) / (x.max() - x.min())

    def solved(C: np.ndarray) -> np.ndarray:
        a, b = np.full(5, 1 / 5), np.full(24, 1 / 24)
        return ot.partial.entropic_partial_wasserstein(a, b, C, EPSILON, m=0.9, numItermax=10000, stopThr=1e-15)

    C = scaled(1 - S[0].double().numpy())
    first = solved(C)
    share = first / first.sum(1, keepdims=True)
    t, s = times.double().numpy(), where.double().numpy()
    apart = np.abs((share @ t)[:, None] - t[None])
    away = np.linalg.norm((share @ s)[:, None] - s[None], axis=-1)
    second = solved(scaled(C + 0.3 * scaled(apart) + 0.2 * scaled(away)))
    ours = token_plan(S, mask, where, mass=0.9, eta=0.2, times=times, gamma=0.3)[0]
    torch.testing.assert_close(ours.double(), torch.from_numpy(second), rtol=0, atol=2e-5)
    assert float(ours.sum()) == pytest.approx(0.9, abs=1e-4)


def test_without_a_price_time_changes_nothing():
    S, mask = torch.rand(1, 3, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, dtype=torch.bool)
    where, times = places(2, 2).repeat(2, 1), torch.tensor([0.0] * 4 + [1.0] * 4)
    torch.testing.assert_close(token_plan(S, mask, where, times=times, gamma=0.0), token_plan(S, mask, where))
    prior = (times - 0.5).expand(1, 3, 8)
    torch.testing.assert_close(token_cost(S, mask, (0.0, prior)), token_cost(S, mask))


# ------------------------------------------------------------------------------------------------ encoders


def test_frames_are_spread_evenly():
    clip = torch.arange(9.0).view(1, 9, 1, 1, 1)
    assert spread(clip, 4).flatten().tolist() == [0, 3, 5, 8]
    assert spread(clip[:, :2], 4).flatten().tolist() == [0, 0, 1, 1]


def test_the_mean_of_frames_does_not_see_their_order():
    """By hand: unit embeddings of each frame, their mean. Permuted and reversed it is the same."""
    encoder, x = clip_encoder("tiny_clip", frames=9), clips()
    frames = F.normalize(encoder.backbone.pictures(x.flatten(0, 1)), dim=-1).view(2, 9, -1).mean(1)
    torch.testing.assert_close(encoder.pictures(x), frames)
    torch.testing.assert_close(encoder.pictures(x.flip(1)), frames, rtol=1e-4, atol=1e-5)
    times, cells = encoder.layout(9)
    assert encoder.patches(x).shape == (2, len(times), encoder.dim) and len(cells) == len(times) == 9 * 64
    assert times[::64].tolist() == pytest.approx([i / 8 for i in range(9)])
    torch.testing.assert_close(cells[64:128], places(8, 8))


def test_a_sheet_has_its_frames_line_by_line_and_sees_their_order(sheet):
    x = torch.arange(9.0).view(1, 9, 1, 1, 1).expand(1, 9, 3, 4, 4)
    assert sheet.sheet(x)[0, 0, ::4, ::4].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    moving = clips(1)
    assert float((sheet.pictures(moving) - sheet.pictures(moving.flip(1))).abs().max()) > 1e-4
    times, cells = sheet.layout(9)  # 6 x 6 patches, 2 x 2 of each frame
    assert (times.view(6, 6)[::2, ::2] * 8).flatten().tolist() == pytest.approx(list(range(9)))
    torch.testing.assert_close(cells.view(6, 6, 2)[:2, :2].reshape(4, 2), places(2, 2))
    torch.testing.assert_close(cells.view(6, 6, 2)[2:4, 4:].reshape(4, 2), places(2, 2))
    with pytest.raises(ValueError, match="sheet=4x4"):
        SheetEncoder(sheet.backbone, 4, 4)


def test_encoders_are_found_where_they_are(sheet, tmp_path):
    sheet.save(tmp_path / "sheet")
    again = clip_encoder(tmp_path / "sheet")
    assert isinstance(again, SheetEncoder) and (again.rows, again.columns) == (3, 3)
    torch.testing.assert_close(again.pictures(clips()), sheet.pictures(clips()), rtol=0.02, atol=0.02)  # stored in fp16
    assert clip_encoder(sheet) is sheet
    assert isinstance(clip_encoder("tests.test_video_transport:Own"), Own)
    with pytest.raises(ValueError, match="encoder='no.such:Thing' cannot be imported"):
        clip_encoder("no.such:Thing")
    with pytest.raises(ValueError, match="frames=0: one at least"):
        clip_encoder("tiny_clip", 0)
    reward = load_reward(tmp_path / "sheet")
    assert reward.name == "sheet" and isinstance(reward.encoder, SheetEncoder)


class Own:
    """An encoder of the user's: the mean colour, and words by their first letter."""

    def pictures(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((1, 3, 4))

    def texts(self, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(p[0] == c) for c in "rgb"] for p in prompts])


def test_an_encoder_of_ones_own():
    x = torch.zeros(2, 4, 3, 8, 8)
    x[0, :, 0] = x[1, :, 2] = 1
    reward = load_reward("video_text", encoder="tests.test_video_transport:Own")
    torch.testing.assert_close(score_one("r", reward, made(x, ("red", "red"))), torch.tensor([1.0, 0.0]))


# ------------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("name", ["video_text", "video_token_transport"])
def test_rewards_of_whole_clips(name, sheet):
    for encoder in ("tiny_clip", sheet):
        reward = load_reward(name, encoder=encoder)
        samples = made(clips(), ("a red circle moving left", "a star growing"))
        values = score_one(name, reward, samples)
        assert values.shape == (2,) and values.isfinite().all() and float(values.abs().max()) <= 1
        alone = torch.cat([score_one(name, reward, samples.select([i])) for i in range(2)])
        torch.testing.assert_close(values, alone, rtol=1e-3, atol=1e-4)
        samples.images = samples.images.clone().requires_grad_()
        reward(samples).sum().backward()
        assert (samples.images.grad.flatten(2).abs().sum(2) > 0).any()
    with pytest.raises(RewardError, match="needs clips"):
        score({"r": reward}, made(clips()[:, 0]))


def test_video_text_is_the_cosine_by_hand():
    encoder, x = load_backbone("tiny_clip"), clips()
    samples = made(x, ("a red circle", "a blue star"))
    seen = F.normalize(encoder.pictures(x.flatten(0, 1)), dim=-1).view(2, 9, -1).mean(1)
    expected = F.cosine_similarity(seen, encoder.texts(samples.texts))
    found = score_one("r", load_reward("video_text", encoder="tiny_clip", frames=9), samples)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_token_transport_of_a_clip_by_hand(sheet):
    samples = made(clips(), ("a red circle moving left", "a star growing"))
    reward = load_reward("video_token_transport", encoder=sheet, gamma=0.4, eta=0.1, mass=0.7)
    S, mask = reward.similarities(samples.images, samples.texts)
    times, where = sheet.layout(9)
    P = token_plan(S, mask, where, mass=0.7, eta=0.1, times=times, gamma=0.4)
    expected = (P * S.masked_fill(~mask[..., None], 0)).sum((1, 2)) / P.sum((1, 2))
    torch.testing.assert_close(score_one("r", reward, samples), expected)
    other = score_one("r", load_reward("video_token_transport", encoder=sheet, gamma=0.0, eta=0.1, mass=0.7), samples)
    assert float((other - expected).abs().max()) > 1e-6


def test_no_words_abstain_and_bad_options_are_named(sheet):
    reward = load_reward("video_token_transport", encoder=sheet)
    assert score_one("r", reward, made(clips(), ("", "a star"))).isnan().tolist() == [True, False]
    for options in ({"mass": 0.0}, {"gamma": -1.0}, {"epsilon": 0.0}, {"mass": 1.0, "published": True}):
        with pytest.raises(ValueError, match="video_token_transport: mass="):
            load_reward("video_token_transport", encoder=sheet, **options)
    with pytest.raises(ValueError, match="wants encoder"):
        load_reward("video_token_transport")
    with pytest.raises(ValueError, match="nowhere holds no transport map"):
        load_reward("video_transport", folder="nowhere")


# ------------------------------------------------------------------------------------------------ captions of clips


def test_neighbours_differ_in_one_word():
    spec = next(s for s in split("train") if s["prompt"] == "a circle moving left quickly")
    prompts = {other["prompt"] for other in neighbours(spec, but=None)}
    assert {"a circle moving left slowly", "a circle moving up quickly", "a star moving left quickly"} <= prompts
    held = {s["prompt"] for s in split("test")}
    assert not held & {other["prompt"] for other in neighbours(spec)}


def test_what_a_clip_shows_is_what_the_verifier_reads():
    """Of drawn clips and captions one word apart; the verifier is wrong about one in some hundreds."""
    rng = np.random.default_rng(0)
    specs = [random_spec(rng, "train") for _ in range(60)]
    drawn = [sample_clip(spec, rng) for spec in specs]
    assert all(shows(clip, spec) for clip, spec in zip(drawn, specs, strict=True))
    others = [next(iter(neighbours(spec, but=None)), spec) for spec in specs]
    pixels = torch.from_numpy(np.stack([render_clip(clip, rng) for clip in drawn]))
    said = torch.tensor([shows(clip, other) for clip, other in zip(drawn, others, strict=True)])
    assert float((follow(pixels, others)[0].bool() == said).float().mean()) > 0.95


def test_growing_was_not_asked_for():
    still = {"shape": "circle", "color": None, "count": 1, "moves": "still", "speed": None, "size": None}
    grown, plain = (Clip((Moving("circle", "red", (24, 24), (0, 0), sides),)) for sides in ((12, 20), (16, 16)))
    assert not shows(grown, {"include": [still]}) and shows(plain, {"include": [still]})
    assert shows(grown, {"include": [{**still, "moves": None, "size": "growing"}]})
    assert not shows(plain, {"include": [{**still, "moves": "left"}]})
    assert not shows(plain, {"include": [still, still]}) and not shows(plain, {"include": []})


def test_captioned_clips_and_their_tests():
    images, specs, shown = captioned_clips(12, seed=0)
    assert images.shape == (12, 9, 3, 48, 48) and shown.diagonal().all() and shown.shape == (12, 12)
    held = {s["prompt"] for s in split("test")}
    assert not held & {spec["prompt"] for spec in specs}
    clips, right, wrong = word_tests(2, seed=0)
    assert len(clips) == len(right) == 12 and {s["prompt"] for s in right} <= held
    assert all(a["prompt"] != b["prompt"] for a, b in zip(right, wrong, strict=True))


# ------------------------------------------------------------------------------------------------ training


def recipe(folder, name: str, batch: int = 32, steps: int = 1, **task):
    return load_reward_recipe(
        {"task": {"name": name, **task}, "batch_size": batch, "max_steps": steps, "report_to": "none", "output_dir": str(folder)}
        | {"eval_steps": 0, "checkpointing_steps": 0, "learning_rate": 2e-3, "lr_warmup_steps": 1}
    )


def test_a_dual_encoder_of_clips_is_trained_saved_and_loaded(tmp_path):
    small = {"width": 32, "layers": 1, "text_width": 32, "text_layers": 1, "dim": 16, "side": 16, "held_out": 2}
    trainer = RewardTrainer(recipe(tmp_path / "run", "video_clip", batch=8, steps=2, **small))
    folder = trainer.train()
    assert {"accuracy", "still", "two"} <= set(trainer.held_out) and trainer.held_out["accuracy"].n == 12
    reward = load_reward(folder)
    assert isinstance(reward.encoder, SheetEncoder) and score_one("r", reward, made(clips())).isfinite().all()
    card = (folder / "README.md").read_text()
    assert "dual encoder for the embedded world of clips" in card and f"flowrl train tiny-video-nft rewards.{folder}=1" in card
    with pytest.raises(ConfigError, match="side=12: a multiple of 8"):
        RewardTrainer(recipe(tmp_path / "other", "video_clip", batch=8, side=12))


def test_a_map_from_captions_to_clips_is_fitted_saved_and_loaded(sheet, tmp_path):
    """Carried texts lie where clips do; the folder holds the encoder too, and still knows that it reads sheets."""
    sheet.save(tmp_path / "encoder")
    trainer = RewardTrainer(
        recipe(tmp_path / "run", "video_transport", backbone=str(tmp_path / "encoder"), count=120, held_out=48)
    )
    folder = trainer.train()
    assert trainer.held_out["frechet"].value < 0.5 * trainer.held_out["frechet_of_texts"].value
    reward = load_reward(folder)
    assert isinstance(reward.encoder, SheetEncoder) and reward.traits.needs == ("clips",)
    samples = made(clips(), ("a red circle moving left", "a star growing"))
    task = trainer.task
    with torch.no_grad():
        y = task.game.transport(F.normalize(task.encoder.texts(samples.texts), dim=-1))
        expected = F.cosine_similarity(y, task.encoder.pictures(samples.images))
    torch.testing.assert_close(score_one("r", reward, samples), expected, rtol=0.02, atol=0.02)  # stored in fp16
    card = json.loads((folder / "reward.json").read_text())
    assert card["reward"] == "video_transport" and card["sheet"] == [3, 3]


def test_pairs_of_texts_and_clips_from_a_file(tmp_path):
    rows = []
    for i, clip in enumerate(clips(6, frames=3)):
        first, *rest = to_pil(clip)
        first.save(tmp_path / f"{i}.png", save_all=True, append_images=rest, duration=125)
        rows.append({"prompt": f"clip {i}", "video": f"{i}.png"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"pairs": str(tmp_path / "pairs.jsonl"), "held_out": 2, "frames": 3, "kind": "mean_shift"}
    task = RewardTrainer(recipe(tmp_path / "run", "video_transport", batch=2, **options)).task
    expected = F.normalize(
        FramesEncoder(load_backbone("tiny_clip"), 3).pictures(clips(6, frames=3)[1:2].mul(255).round() / 255), dim=-1
    )
    torch.testing.assert_close(task.x[1:2], expected, rtol=1e-3, atol=1e-4)
    assert task.y.shape == (4, 64) and not math.isnan(float(task.y.sum()))
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a circle", "image": "0.png"}\n')
    with pytest.raises(ConfigError, match='wants a "video"'):
        RewardTrainer(recipe(tmp_path / "other", "video_transport", **options))
