"""VideoReward on a Qwen2-VL of thumbnail size: the published layout, the processor's pixels and tokens, training."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from flowrl.batch import Prompt, Samples
from flowrl.clip_pairs import ClipPair
from flowrl.config import ConfigError
from flowrl.reward_models import RewardError, load_reward, score
from flowrl.reward_models.video_checkpoint import canonical, merged
from flowrl.reward_models.video_reward import (
    HEADS,
    TEMPLATE,
    TOKENS,
    Settings,
    VideoRewardNetwork,
    frame_indices,
    frame_size,
    read_template,
)
from flowrl.tiny.clip_pairs import flawed_pair
from flowrl.train.rewards.loop import RewardTrainer, load_reward_recipe
from flowrl.train.rewards.losses import bradley_terry_with_ties
from flowrl.train.rewards.video_preference import SHORT, VideoPreference, known_mean, thumbnail

UNITS = {"VQ_mean": 0.5, "VQ_std": 2.0, "MQ_mean": -0.25, "MQ_std": 4.0, "TA_mean": 0.125, "TA_std": 0.5}
DATA = {
    "fps": 2.0, "num_frames": None, "max_frame_pixels": 48 * 48, "min_frame_pixels": 48 * 48, "sample_type": "uniform",
    "prompt_template_type": "detailed_special", "eval_dim": list(HEADS),
}  # fmt: skip


@pytest.fixture(scope="module")
def network() -> VideoRewardNetwork:
    torch.manual_seed(0)
    made = thumbnail(width=32, layers=1)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def base(network, tmp_path_factory) -> Path:
    """A Qwen2-VL that knows neither the tokens nor LoRA, its settings in one level, as transformers 4 wrote them."""
    from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("base")
    model = Qwen2VLForConditionalGeneration(network.model.config)
    model.model.load_state_dict(network.model.state_dict())
    model.resize_token_embeddings(len(network.tokenizer) - len(TOKENS))
    model.save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    text = facts.pop("text_config")
    scaling = {"type": "mrope", "mrope_section": text.pop("rope_parameters")["mrope_section"]}
    flat = {**{k: v for k, v in text.items() if k != "model_type"}, **facts, "rope_theta": 1e4, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(flat))
    words = PreTrainedTokenizerFast(
        tokenizer_object=network.tokenizer.backend_tokenizer.from_str(network.tokenizer.backend_tokenizer.to_str()),
        unk_token="<unk>", pad_token="<pad>", chat_template=network.tokenizer.chat_template,
    )  # fmt: skip
    words.save_pretrained(folder)
    file = json.loads((folder / "tokenizer.json").read_text())
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in TOKENS]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return folder


def lora_of(network: VideoRewardNetwork, rank: int = 4, scale: float = 2.0) -> dict[str, torch.Tensor]:
    """The network's weights under the names of the published file, with LoRA taken out of every projection of the queries."""
    state, g = {}, torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        old = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if not re.search(r"model\.layers.*q_proj\.weight", old):
            state[f"base_model.model.{old}"] = value.clone()
            continue
        A, B = torch.randn(rank, value.shape[1], generator=g), torch.randn(value.shape[0], rank, generator=g)
        stem = f"base_model.model.{old.removesuffix('.weight')}"
        state |= {f"{stem}.base_layer.weight": value - scale * B @ A}
        state |= {f"{stem}.lora_A.default.weight": A, f"{stem}.lora_B.default.weight": B}
    state["base_model.model.lm_head.weight"] = torch.zeros(3, 3)
    return state


def facts_of(base: Path, **sections: dict) -> dict:
    model = {"model_name_or_path": str(base), "output_dim": 3, "use_special_tokens": True, "reward_token": "special"}
    lora = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "use_rslora": False}
    known = {"data_config": DATA, "model_config": model, "peft_lora_config": lora, "inference_config": UNITS}
    return {**known, **sections}


@pytest.fixture(scope="module")
def folder(network, base, tmp_path_factory) -> Path:
    """The published layout: LoRA's names in model.pth of the last step; an earlier step is not read."""
    place = tmp_path_factory.mktemp("video") / "reward"
    (place / "checkpoint-11").mkdir(parents=True)
    (place / "checkpoint-9").mkdir()
    (place / "checkpoint-9" / "model.pth").write_bytes(b"nothing")
    (place / "model_config.json").write_text(json.dumps(facts_of(base)))
    (place / "template.txt").write_text(SHORT)
    torch.save(lora_of(network), place / "checkpoint-11" / "model.pth")
    network.tokenizer.save_pretrained(place / "checkpoint-11" / "tokenizer")
    return place


def clips(count: int = 2, frames: int = 9, size: tuple[int, int] = (48, 48), seed: int = 0) -> torch.Tensor:
    """In 256 levels, as a file would hold them."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 3, *size), generator=g) / 255


def smooth(clip: torch.Tensor) -> torch.Tensor:
    """Without the edges that two ways of clipping treat differently; in 256 levels again."""
    return (F.avg_pool2d(F.pad(clip, (4, 4, 4, 4), mode="reflect"), 9, stride=1) * 255).round() / 255


def made(images: torch.Tensor, texts: list[str] | None = None, fps: float | None = 8) -> Samples:
    texts = texts or ["a red circle moving left", "a star growing", "a square moving up"][: len(images)]
    n = len(texts)
    return Samples([Prompt(t) for t in texts], list(range(n)), torch.arange(n), torch.zeros(n, 1), images, fps=fps)


def reward_of(folder: Path, **options):
    return load_reward("video_reward", model=folder, dtype="float32", **options)


# ------------------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize(
    ("count", "fps", "rate", "frames", "expected"),
    [
        (81, 16, 2, None, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),  # 81 / 16 * 2 = 10.1: ten
        (9, 8, 2, None, [0, 3, 5, 8]),  # 2.25, and four at least
        (3, 8, 2, None, [0, 2]),  # four, and two of three at most
        (24, 24, 24, None, list(range(24))),  # the clip's own rate
        (9, None, 2, 6, [0, 2, 3, 5, 6, 8]),
        (9, None, 2, 5, [0, 3, 5, 8]),  # an even number: round(2.5) = 2 times two
        (5, None, 2, 8, list(range(5))),
    ],
)
def test_frames_are_sampled_as_qwen_samples_them(count, fps, rate, frames, expected):
    assert frame_indices(count, fps, rate, frames).tolist() == expected


def test_clips_that_cannot_be_sampled():
    with pytest.raises(ValueError, match="a clip of 1 frames, 1 of them sampled, is no clip"):
        frame_indices(1, None, 2, 4)
    with pytest.raises(ValueError, match="frame rate of a clip must be known"):
        frame_indices(9, None, 2)


@pytest.mark.parametrize("size", [(480, 832), (720, 1280), (48, 48), (448, 448), (300, 90), (1080, 600)])
def test_frame_sizes_are_qwens(size):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    assert frame_size(size, 28, 128 * 28 * 28, 448 * 448) == smart_resize(*size, 28, 128 * 28 * 28, 448 * 448)


def test_a_frame_of_wan_by_hand():
    """480 x 832: 399,360 pixels, beta = sqrt(399360 / 200704) = 1.4106: 340.3 and 589.8, in whole tokens 336 and 588."""
    assert frame_size((480, 832), 28, 100352, 200704) == (336, 588)


@pytest.mark.parametrize(("size", "frames"), [((48, 48), 8), ((48, 48), 5), ((40, 70), 4)])
def test_pixels_and_tokens_are_those_of_the_processor(network, size, frames):
    """The same frames through transformers' own processor: pixels within the rounding of 8 bits, tokens equal."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    area = {"shortest_edge": 48 * 48, "longest_edge": 48 * 48}
    shape = {"patch_size": 6, "merge_size": 2, "temporal_patch_size": 2}
    videos = Qwen2VLVideoProcessor(size=area, **shape, cap_pixels_per_frame=False)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=area, **shape), network.tokenizer, videos, chat_template=network.tokenizer.chat_template
    )
    clip, prompt = smooth(clips(1, frames, size)[0]), "a red circle moving left"
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": SHORT.replace("{text_prompt}", prompt)}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    theirs = processor(text=[text], videos=[(clip * 255).round().byte()], return_tensors="pt", padding=True)
    patches, grid = network.patches(clip)
    assert theirs["video_grid_thw"].tolist() == [list(grid)]
    exact = size == (48, 48)  # nothing is resized
    torch.testing.assert_close(patches, theirs["pixel_values_videos"], rtol=0, atol=1e-5 if exact else 3 / 255 / 0.26)
    ids, mask = network.tokens([prompt], [grid])
    assert ids.tolist() == theirs["input_ids"].tolist() and mask.tolist() == theirs["attention_mask"].tolist()
    if exact:
        theirs.pop("second_per_grid_ts", None)
        states = network.model(**theirs).last_hidden_state[0]
        at = torch.stack([states[(ids[0] == token).nonzero()[0, 0]] for token in network.ids])
        torch.testing.assert_close(network([clip], [prompt])[0], (at @ network.rm_head.weight.T).diagonal(), rtol=1e-4, atol=1e-5)


def test_templates_are_checked_and_python_is_read_and_not_run(tmp_path):
    places = [TEMPLATE.index(part) for part in (TOKENS[0], TOKENS[1], "{text_prompt}", TOKENS[2])]
    assert places == sorted(places)
    (tmp_path / "prompt_template.py").write_text(f'raise SystemExit\nOTHER = "simple {{text_prompt}}"\nLONG = """{SHORT}"""\n')
    assert read_template(tmp_path / "prompt_template.py") == SHORT
    (tmp_path / "short.txt").write_text("{text_prompt} <|VQ_reward|> <|MQ_reward|>")
    with pytest.raises(ValueError, match=r"short.txt'?: it must hold <\|TA_reward\|> once, and does 0 times"):
        read_template(tmp_path / "short.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        read_template(tmp_path / "none.txt")


# ------------------------------------------------------------------------------------------------ the published layout


def test_the_published_layout_is_read_and_lora_merged(folder, network):
    loaded = VideoRewardNetwork.load(folder, dtype="float32")
    images, texts = clips(), made(clips()).texts
    torch.testing.assert_close(loaded(images, texts), network(images, texts), rtol=1e-4, atol=1e-4)
    assert loaded.settings == Settings(2.0, None, 2304, 2304, *({h: UNITS[f"{h}_{k}"] for h in HEADS} for k in ("mean", "std")))
    assert loaded.ids == network.ids and loaded.template == SHORT
    assert not any(p.requires_grad for p in loaded.parameters())


def test_an_adapter_on_top_of_the_base_model(folder, base, network, tmp_path):
    """What the authors' trainer writes: LoRA alone, and what else was trained; the rest is the base model's."""
    state = lora_of(network)
    (tmp_path / "checkpoint-3").mkdir()
    lora = {name.replace(".default", ""): value for name, value in state.items() if ".lora_" in name}
    save_file(lora, tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    others = ("base_layer", "rm_head", "embed_tokens", "visual")
    rest = {name: value for name, value in state.items() if any(part in name for part in others)}
    torch.save(rest, tmp_path / "checkpoint-3" / "non_lora_state_dict.pth")
    (tmp_path / "model_config.json").write_text(json.dumps(facts_of(base)))
    loaded = VideoRewardNetwork.load(tmp_path, template=folder / "template.txt", dtype="float32")
    images, texts = clips(), made(clips()).texts
    torch.testing.assert_close(loaded(images, texts), network(images, texts), rtol=1e-4, atol=1e-4)


def test_names_of_weights():
    for theirs, ours in (
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "language_model.layers.0.mlp.up_proj.weight"),
        ("base_model.model.visual.blocks.0.norm1.bias", "visual.blocks.0.norm1.bias"),
        ("base_model.model.model.layers.0.a.q_proj.lora_A.default.weight", "language_model.layers.0.a.q_proj.lora_A.weight"),
        ("model.language_model.norm.weight", "language_model.norm.weight"),
        ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("model.norm.weight", "language_model.norm.weight"),
        ("base_model.model.rm_head.weight", "rm_head.weight"),
    ):
        assert canonical(theirs) == ours


def test_lora_by_hand():
    """W = 1, B A = [[2], [0]] [[1, 3]] = [[2, 6], [0, 0]], scale 0.5: [[2, 4], [1, 1]]."""
    state = {
        "q.weight": torch.ones(2, 2),
        "q.lora_A.weight": torch.tensor([[1.0, 3]]),
        "q.lora_B.weight": torch.tensor([[2.0], [0]]),
    }
    assert merged(state, 0.5)["q.weight"].tolist() == [[2, 4], [1, 1]]
    with pytest.raises(ValueError, match="does not say LoRA's scale"):
        merged(state, None)
    with pytest.raises(ValueError, match="q.lora_A.weight has no weight that it belongs to"):
        merged({name: value for name, value in state.items() if name != "q.weight"}, 0.5)


def test_what_is_missing_or_of_another_kind_is_named(folder, base, tmp_path):
    def load(state: dict | None = None, **sections: dict):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        (place / "checkpoint-1").mkdir(parents=True)
        (place / "model_config.json").write_text(json.dumps(facts_of(base, **sections)))
        if state is not None:
            torch.save(state, place / "checkpoint-1" / "model.pth")
        return VideoRewardNetwork.load(place, dtype="float32")

    whole = torch.load(folder / "checkpoint-11" / "model.pth", weights_only=True)
    with pytest.raises(ValueError, match="no VideoReward: it has no model_config.json"):
        VideoRewardNetwork.load(tmp_path)
    with pytest.raises(ValueError, match="no weights at"):
        VideoRewardNetwork.load(tmp_path / "none" / "there")
    with pytest.raises(ValueError, match="holds neither model.pth nor"):
        load()
    with pytest.raises(ValueError, match="lacks rm_head.weight"):
        load({name: value for name, value in whole.items() if "rm_head" not in name})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its architecture.*language_model.norm.weight"):
        load({name: value for name, value in whole.items() if not name.endswith("model.norm.weight")})
    with pytest.raises(ValueError, match="reward_token is 'last'; only 'special'"):
        load(whole, model_config={"model_name_or_path": str(base), "reward_token": "last"})
    with pytest.raises(ValueError, match="sample_type is 'multi_pts'"):
        load(whole, data_config={**DATA, "sample_type": "multi_pts"})
    with pytest.raises(ValueError, match="no weights at .*nowhere"):
        load(whole, model_config={"model_name_or_path": "/nowhere/at/all"})


# ------------------------------------------------------------------------------------------------ the reward


def test_scores_are_standardised_and_added(folder, network):
    """(raw - mean) / std with the checkpoint's own constants, on the frames 0, 3, 5, 8 of 9 at 8 a second."""
    samples = made(clips())
    raw = network([clip[[0, 3, 5, 8]] for clip in samples.images], samples.texts)
    expected = (raw - torch.tensor([0.5, -0.25, 0.125])) / torch.tensor([2.0, 4.0, 0.5])
    reward = reward_of(folder)
    torch.testing.assert_close(reward.scores(samples), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward(samples), expected.sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward_of(folder, dimensions="MQ")(samples), expected[:, 1], rtol=1e-4, atol=1e-4)
    mixed = reward_of(folder, dimensions={"VQ": 0.5, "TA": 2})(samples)
    torch.testing.assert_close(mixed, 0.5 * expected[:, 0] + 2 * expected[:, 2], rtol=1e-4, atol=1e-4)


def test_visual_and_motion_quality_are_blind_to_the_prompt(folder):
    """Attention is causal, and the prompt stands behind their tokens; TA reads it."""
    reward, images = reward_of(folder), clips()
    one = reward.scores(made(images, ["a red circle moving left", "a star growing"]))
    other = reward.scores(made(images, ["a blue square standing still and a star moving up", "a ring"]))
    torch.testing.assert_close(one[:, :2], other[:, :2], rtol=1e-4, atol=1e-5)
    assert float((one[:, 2] - other[:, 2]).abs().min()) > 1e-3


def test_a_clip_is_scored_alike_alone_and_in_company(folder):
    samples = made(clips(3))
    together = reward_of(folder)(samples)
    apart = torch.cat([reward_of(folder, batch_size=1)(samples.select([i])) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_time_has_a_direction(folder):
    """Reversed, a clip is another one; of equal frames it is the same."""
    images = clips()
    forth, back = (reward_of(folder, num_frames=8).scores(made(x)) for x in (images, images.flip(1)))
    assert float((forth - back).abs().max()) > 1e-3
    frozen = images[:, :1].expand_as(images)
    torch.testing.assert_close(*(reward_of(folder).scores(made(x)) for x in (frozen, frozen.flip(1))))


def test_the_frame_rate_must_be_known(folder):
    samples = made(clips(), fps=None)
    with pytest.raises(RewardError, match="needs fps"):
        score({"video": reward_of(folder)}, samples)
    assert reward_of(folder).traits.needs == ("clips", "fps")
    torch.testing.assert_close(reward_of(folder, fps=8)(samples), reward_of(folder)(made(clips())))
    assert reward_of(folder, num_frames=4)(samples).isfinite().all()
    slow = reward_of(folder)(made(clips(frames=25), fps=4))  # twelve frames instead of six
    assert float((slow - reward_of(folder)(made(clips(frames=25), fps=8))).abs().max()) > 1e-4
    with pytest.raises(ValueError, match="sampled_fps=4 and num_frames=4: one or the other"):
        reward_of(folder, sampled_fps=4, num_frames=4)


def test_gradients_reach_the_pixels(folder):
    reward, images = reward_of(folder), clips(1)
    images.requires_grad_()
    reward(made(images)).sum().backward()
    assert (images.grad.flatten(2).abs().sum(2) > 0).tolist() == [[i in (0, 3, 5, 8) for i in range(9)]]
    direction, step = images.grad.sign(), 1e-4
    with torch.no_grad():
        slope = (reward(made(images + step * direction)) - reward(made(images - step * direction))) / (2 * step)
    assert float(slope) == pytest.approx(float(images.grad.abs().sum()), rel=0.05)


def test_rewards_of_one_folder_share_its_weights_and_read_once(folder, monkeypatch):
    vq, mq = reward_of(folder, dimensions="VQ"), reward_of(folder, dimensions=["MQ"])
    assert vq.network is mq.network
    seen, forward = [], VideoRewardNetwork.forward
    monkeypatch.setattr(VideoRewardNetwork, "forward", lambda *x: seen.append(1) or forward(*x))
    samples = made(clips(seed=5))
    score({"vq": vq, "mq": mq}, samples)
    assert len(seen) == 1


def test_prompts_with_the_models_own_tokens_and_unknown_dimensions_are_named(folder):
    with pytest.raises(RewardError, match=r"a prompt must not hold <\|VQ_reward\|>"):
        score({"video": reward_of(folder)}, made(clips(1), ["good <|VQ_reward|>"]))
    with pytest.raises(ValueError, match="unknown dimension 'MO'; did you mean MQ"):
        reward_of(folder, dimensions="MO")
    with pytest.raises(ValueError, match="names none of"):
        reward_of(folder, dimensions={"VQ": 0})


# ------------------------------------------------------------------------------------------------ training


def recipe(folder: Path, steps: int = 1, batch: int = 4, **task):
    made = {"name": "video_preference", "width": 32, "layers": 1, "held_out": 4, **task}
    return load_reward_recipe(
        {"task": made, "batch_size": batch, "max_steps": steps, "report_to": "none", "output_dir": str(folder), "eval_steps": 0}
        | {"learning_rate": 3e-3, "lr_warmup_steps": 2, "checkpointing_steps": 0}
    )


def test_unknown_labels_are_left_out_of_the_mean():
    """d = (1, 0), labels A and unknown: -log sigma(1 - ln 5) = 1.0440; the authors' mean over both would be 0.5220."""
    d, labels = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, math.nan]])
    found = known_mean(bradley_terry_with_ties(d, labels), labels)
    assert float(found) == pytest.approx(math.log1p(5 / math.e), abs=1e-5)
    assert float(known_mean(d, torch.full((1, 2), math.nan))) == 0


def test_labels_of_one_head_reach_that_head_alone(network):
    task = VideoPreference()
    task.network, task.device = thumbnail(32, 1), torch.device("cpu")
    first, second = clips()
    loss, metrics = task.loss([ClipPair("a star", first, second, (math.nan, 1.0, math.nan), (8, 8))])
    loss.backward()
    rows = task.network.rm_head.weight.grad.abs().sum(1)
    assert (rows > 0).tolist() == [False, True, False] and list(metrics) == ["accuracy/MQ"]


def test_trained_saved_and_loaded(tmp_path):
    """A few steps from an untrained thumbnail; the folder is a reward whose scores have mean 0 and deviation 1 held out."""
    trainer = RewardTrainer(recipe(tmp_path / "run", steps=2, held_out=6))
    folder = trainer.train()
    reward = load_reward(folder, dtype="float32")
    pairs = trainer.task.test_set
    samples = made(
        torch.stack([clip for pair in pairs for clip in (pair.first, pair.second)]), [p.prompt for p in pairs for _ in "ab"]
    )
    scores = reward.scores(samples)
    torch.testing.assert_close(scores.mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(scores.std(0), torch.ones(3), rtol=1e-3, atol=0)
    assert reward.name == "run" and set(trainer.held_out) >= {f"accuracy/{head}" for head in HEADS}
    assert "three heads" in (folder / "README.md").read_text()


def test_three_heads_learn_what_their_labels_say():
    """Sixteen pairs by heart: the loss, 1.2 at first, falls below 0.6, and every head has its own order right."""
    torch.manual_seed(0)
    task = VideoPreference()
    task.network, task.device = thumbnail(32, 1), torch.device("cpu")
    rng = np.random.default_rng(0)
    pairs = [flawed_pair(rng) for _ in range(8)]
    batch = [ClipPair(p.spec["prompt"], *torch.from_numpy(p.clips).float(), p.labels, (8, 8)) for p in pairs]
    optimizer = torch.optim.Adam(task.network.parameters(), 3e-3)
    first, _ = task.loss(batch)
    for _ in range(40):
        optimizer.zero_grad()
        loss, metrics = task.loss(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first.item()
    assert min(metrics.values()) >= 0.75


def test_lora_trains_lora_head_tokens_and_eyes_and_is_merged(folder, network, tmp_path):
    """From a folder in the published layout; of the embeddings those of the three tokens change alone."""
    trainer = RewardTrainer(recipe(tmp_path / "run", model=str(folder), lora_rank=2, lora_alpha=4, train_vision=False))
    kinds = {re.sub(r".*(lora_[AB]|rm_head|marks\.rows).*", r"\1", name) for name in trainer.trained}
    assert kinds == {"lora_A", "lora_B", "rm_head", "marks.rows"}
    before = trainer.task.network.model.get_input_embeddings().weight.detach().clone()
    out = trainer.train()
    with torch.no_grad(), trainer.averaged():
        pair = trainer.task.test_set[0]
        raw = trainer.task.scores_of([pair])[0]
    loaded = VideoRewardNetwork.load(out, dtype="float32")
    again = loaded([loaded.sampled(clip, 8) for clip in (pair.first, pair.second)], [pair.prompt] * 2)
    torch.testing.assert_close(again, raw, rtol=0.05, atol=0.05)  # stored in bfloat16
    changed = (loaded.model.get_input_embeddings().weight - before).abs().amax(1) > 0.02
    assert set(changed.nonzero()[:, 0].tolist()) <= set(network.ids)


def test_a_language_model_is_given_tokens_and_a_head(base, tmp_path):
    task = VideoPreference(model=str(base), lora_rank=0, num_frames=4, max_frame_pixels=2304, held_out=2)
    task.prepare(SimpleNamespace(seed=0, batch_size=2), torch.device("cpu"))  # type: ignore[arg-type]
    network = task.network
    assert network.template == TEMPLATE and network.settings.num_frames == 4
    assert len(network.model.get_input_embeddings().weight) == len(network.tokenizer) > max(network.ids)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"tie_factor": 1.0}, "tie_factor=1.0: must exceed 1"),
        ({"width": 48}, "width=48: must be a multiple of 32"),
        ({"data": "/no/such.csv"}, "no preference data at /no/such.csv"),
        ({"model": "/no/such/model"}, "no weights at /no/such/model"),
        ({"lora_rank": -1}, "lora_rank=-1 must not be negative"),
    ],
)
def test_bad_options_are_named(tmp_path, task, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        RewardTrainer(recipe(tmp_path / "run", **task))
