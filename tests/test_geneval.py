"""GenEval's rules on detections worked by hand, and real detectors of transformers at the size of a toy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models import load_reward
from flowrl.reward_models.base import to_pil
from flowrl.reward_models.detectors import ClipColors, Found, ZeroShotDetector, load_detector
from flowrl.reward_models.geneval import AXES, Clause, GenEval, Spec, by_name, direction, holds, official, read_spec, terms
from flowrl.tiny.render import render_batch
from flowrl.tiny.scenes import RELATIONS, Object, Scene, sample_scene, split
from flowrl.tiny.verify import verify

LEFT, RIGHT, TOP = (0.0, 0.4, 0.2, 0.6), (0.8, 0.4, 1.0, 0.6), (0.4, 0.0, 0.6, 0.2)


def dogs(*boxes: tuple, color: str | None = None) -> list[Found]:
    return [Found("dog", box, 0.9 - 0.01 * i, color) for i, box in enumerate(boxes)]


def cats(*boxes: tuple, color: str | None = None) -> list[Found]:
    return [Found("cat", box, 0.9, color) for box in boxes]


def verdicts(objects: dict, spec: Spec) -> tuple[bool, float, bool]:
    """strict, dense, official."""
    values = terms(objects, spec)
    return min(values) == 1, sum(values) / len(values), official(objects, spec)


def samples(images: torch.Tensor, columns: list[dict]) -> Samples:
    prompts = [Prompt(f"prompt {i}", c) for i, c in enumerate(columns)]
    return Samples(prompts, list(range(len(images))), torch.zeros(len(images), dtype=torch.int64), images, images)


# ------------------------------------------------------------------------------------------------ metadata


def test_both_formats_become_one_spec():
    geneval = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    }
    spec = read_spec(geneval)
    assert spec == Spec((Clause("dog"), Clause("cat", relation=("left of", 0))), (), "position")
    counting = {"tag": "counting", "include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
    assert read_spec(counting) == Spec((Clause("dog", 3),), (Clause("dog", 4),), "counting")
    tiny = next(s for s in split("train") if s["relation"])
    first, second = tiny["include"]
    spec = read_spec(tiny)
    assert spec.include == (Clause(first["shape"], relation=(tiny["relation"], 1)), Clause(second["shape"]))
    assert Clause("dog", 1, "red").phrase == "red dog" and read_spec({}) is None and set(AXES) == set(RELATIONS)


@pytest.mark.parametrize(
    "include",
    [["dog"], [{"count": 1}], [{"class": "dog", "count": 0}], [{"class": "dog", "position": ["near", 0]}],
     [{"class": "dog", "position": ["above", 3]}], [{"class": "dog", "position": "above"}]],
)  # fmt: skip
def test_malformed_metadata_names_the_column(include):
    with pytest.raises(ValueError, match="column include"):
        read_spec({"include": include})


# ------------------------------------------------------------------------------------------------ rules


def test_direction_is_shortened_by_a_tenth_of_both_sides():
    """Centres 3 right and 4 down of each other, sides 10 and 10: (3 - 2) / 5 and (4 - 2) / 5."""
    a, b = (3, 4, 13, 14), (0, 0, 10, 10)
    assert direction(a, b, "right of") == pytest.approx(0.2) and direction(a, b, "left of") == pytest.approx(-0.2)
    assert direction(a, b, "below") == pytest.approx(0.4) and direction(b, a, "above") == pytest.approx(0.4)
    assert direction(a, a, "below") == 0


def test_a_relation_holds_for_all_pairs_or_not_at_all():
    assert holds(dogs(LEFT), cats(RIGHT), "left of") and not holds(dogs(LEFT), cats(RIGHT), "right of")
    assert holds(dogs(LEFT), cats(RIGHT, TOP), "left of") and not holds(dogs(LEFT, RIGHT), cats(TOP), "left of")
    assert not holds([], cats(RIGHT), "left of")
    # Diagonally both axes hold, as in GenEval: cosine 0.7 each.
    corner = (0.8, 0.0, 1.0, 0.2)
    far = (0.0, 0.8, 0.2, 1.0)
    assert holds(dogs(corner), cats(far), "right of") and holds(dogs(corner), cats(far), "above")


def test_counts():
    """Three asked for: two give 2/3, five 1/3, six or more 0 and never less; official does not mind a fourth by itself."""
    spec = Spec((Clause("dog", 3),))
    boxes = [(0.1 * i, 0.0, 0.1 * i + 0.1, 0.1) for i in range(8)]
    dense = {n: verdicts({"dog": dogs(*boxes[:n])}, spec)[1] for n in (0, 2, 3, 5, 6, 8)}
    assert dense == pytest.approx({0: 0, 2: 2 / 3, 3: 1, 5: 1 / 3, 6: 0, 8: 0})
    assert verdicts({"dog": dogs(*boxes[:4])}, spec)[0::2] == (False, True)
    excluding = Spec((Clause("dog", 3),), (Clause("dog", 4),))
    assert verdicts({"dog": dogs(*boxes[:4])}, excluding) == (False, pytest.approx(2 / 3), False)
    assert verdicts({"dog": dogs(*boxes[:3])}, excluding) == (True, 1, True)


def test_one_asked_three_there_is_0_not_minus_1():
    assert verdicts({"dog": dogs(LEFT, RIGHT, TOP)}, Spec((Clause("dog"),))) == (False, 0, True)


def test_colors():
    """A colour counts only where the count is right, and then by its share."""
    spec = Spec((Clause("dog", 2, "red"),))
    red, blue = dogs(LEFT, color="red"), dogs(RIGHT, color="blue")
    assert verdicts({"dog": red + dogs(TOP, color="red")}, spec) == (True, 1, True)
    assert verdicts({"dog": red + blue}, spec) == (False, 0.75, False)
    assert verdicts({"dog": red}, spec) == (False, 0.25, False)
    # Official looks at the best two only; the third, of another colour, is not seen.
    assert official({"dog": [*dogs(LEFT, TOP, color="red"), Found("dog", RIGHT, 0.3, "blue")]}, spec)


def test_a_wrong_position_counts_0_not_half():
    """Dog and cat are there, on the wrong sides: (1 + 1 + 0) / 3."""
    spec = Spec((Clause("dog"), Clause("cat", relation=("left of", 0))))
    right = {"dog": dogs(RIGHT), "cat": cats(LEFT)}
    wrong = {"dog": dogs(LEFT), "cat": cats(RIGHT)}
    assert verdicts(right, spec) == (True, 1, True)
    assert terms(wrong, spec) == [1, 1, 0] and verdicts(wrong, spec) == (False, pytest.approx(2 / 3), False)
    assert terms({"dog": dogs(RIGHT), "cat": []}, spec) == [1, 0, 0]
    # Two cats, both left of the dog: strict counts, official takes the better one.
    assert verdicts({"dog": dogs(RIGHT), "cat": cats(LEFT, TOP)}, spec) == (False, pytest.approx(1 / 3), True)


def test_excluded_things():
    spec = Spec((Clause("dog"),), (Clause("cat"),))
    assert verdicts({"dog": dogs(LEFT), "cat": []}, spec) == (True, 1, True)
    assert verdicts({"dog": dogs(LEFT), "cat": cats(RIGHT)}, spec) == (False, 0.5, False)


def test_official_asks_less_than_strict_on_random_detections():
    """What is strictly right is officially right; dense is 1 exactly where strict holds, and always in [0, 1]."""
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        spec = Spec(
            (Clause("dog", int(rng.integers(1, 3)), rng.choice([None, "red"])), Clause("cat", relation=("above", 0))),
            (Clause("dog", 3),) if rng.random() < 0.5 else (),
        )
        objects = {
            name: [
                Found(name, (x, y, x + 0.1, y + 0.1), 0.9, "red" if rng.random() < 0.7 else "blue")
                for x, y in rng.random((rng.integers(0, 4), 2))
            ]
            for name in ("dog", "cat")
        }
        strict, dense, lenient = verdicts(objects, spec)
        assert lenient or not strict
        assert 0 <= dense <= 1 and (dense == 1) == strict
        seen.add((strict, lenient))
    assert seen == {(False, False), (False, True), (True, True)}


def test_the_best_of_each_name_above_the_threshold():
    found = [Found("dog", LEFT, s) for s in (0.2, 0.9, 0.5)] + [Found("cat", LEFT, 0.4), Found("mouse", LEFT, 0.9)]
    objects = by_name(found, ["dog", "cat", "bird"], threshold=0.3)
    assert [f.score for f in objects["dog"]] == [0.9, 0.5] and len(objects["cat"]) == 1 and objects["bird"] == []
    assert len(by_name([Found("dog", LEFT, 0.9)] * 30, ["dog"], 0.3)["dog"]) == 16


# ------------------------------------------------------------------------------------------------ the reward


def test_on_rendered_scenes_it_agrees_with_the_exact_verifier():
    """Right scenes, those of other captions, and some with a thing too few: all modes, all six kinds."""
    rng = np.random.default_rng(0)
    specs = split("test")
    right = [sample_scene(spec, rng) for spec in specs]
    scenes = [*right, *(right[i] for i in rng.permutation(len(right))), *(Scene(s.objects[1:]) for s in right)]
    pictures, specs = torch.as_tensor(render_batch(scenes)), specs * 3
    exact = verify(pictures, specs)[0]
    batch = samples(pictures, specs)
    strict, dense, lenient = (GenEval(mode)(batch) for mode in ("strict", "dense", "official"))
    # GenEval does not mind what it does not ask about; the exact verifier does.
    assert (strict >= exact).all() and 100 < exact.sum() < 250 and (strict == exact).float().mean() > 0.9
    assert (lenient >= strict).all() and torch.equal(dense == 1, strict == 1) and (strict[: len(right)] == 1).all()


def test_abstains_without_metadata_and_checks_its_options():
    reward = load_reward("geneval", mode="dense")
    scene = Scene((Object("circle", "red", 32, 32, 24),))
    pictures = torch.as_tensor(render_batch([scene] * 2))
    scores = reward(samples(pictures, [{}, {"include": [{"class": "circle", "count": 1, "color": "blue"}]}]))
    assert scores[0].isnan() and scores[1] == 0.5
    with pytest.raises(ValueError, match="mode='loose'"):
        GenEval("loose")


def test_counting_prompts_have_a_threshold_of_their_own():
    class Unsure:
        def detect(self, images, phrases):
            return [[Found("dog", LEFT, 0.95), Found("dog", RIGHT, 0.5)] for _ in phrases]

    include = {"include": [{"class": "dog", "count": 2}]}
    batch = samples(torch.zeros(2, 3, 8, 8), [{**include, "tag": "counting"}, {**include, "tag": "two_object"}])
    assert GenEval(detector=Unsure())(batch).tolist() == [1, 1]
    assert GenEval(detector=Unsure(), counting_threshold=0.9)(batch).tolist() == [0, 1]


def test_colors_are_asked_for_only_where_the_detector_does_not_name_them():
    calls = []

    def color(image, boxes, name):
        calls.append((tuple(image.shape), boxes, name))
        return ["red"] * len(boxes)

    class Blind:
        def detect(self, images, phrases):
            return [[Found("dog", LEFT, 0.9), Found("dog", RIGHT, 0.8, "blue"), Found("cat", TOP, 0.9)] for _ in phrases]

    metadata = {"include": [{"class": "dog", "count": 2, "color": "red"}, {"class": "cat", "count": 1}]}
    scores = GenEval("dense", detector=Blind(), color=color)(samples(torch.zeros(1, 3, 8, 8), [metadata]))
    assert calls == [((3, 8, 8), [LEFT], "dog")]
    assert scores.tolist() == pytest.approx([(1 + 0.5 + 1) / 3])


# ------------------------------------------------------------------------------------------------ real detectors, tiny weights

WORDS = ["a", "red", "blue", "circle", "square", "star"]


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory) -> str:
    """A Grounding DINO of a few layers with random weights, as a folder."""
    from transformers import (
        BertConfig,
        BertTokenizerFast,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("grounding-dino")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_indices=[2, 3, 4]
        ),
        text_config=BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        num_queries=40, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, d_model=32, max_text_len=32,
    )  # fmt: skip
    model = GroundingDinoForObjectDetection(config)
    model.save_pretrained(folder)
    pixels = GroundingDinoImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
    GroundingDinoProcessor(pixels, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory) -> str:
    """An OWLv2 of one layer with random weights, as a folder."""
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor, Owlv2Processor

    from flowrl.tiny.models import make_tokenizer

    folder = tmp_path_factory.mktemp("owlv2")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Owlv2Config(
        text_config={**small, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**small, "image_size": 64, "patch_size": 16},
        projection_dim=32,
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return str(folder)


PHRASES = ["a red circle", "Blue square."]


@pytest.mark.parametrize("which", ["grounding_dino", "owlv2"])
def test_zero_shot_boxes_are_those_of_transformers_own_reading(which, request):
    """Scores and boxes of every query against the processor's post-processing, in a picture that is not square."""
    detector = load_detector(request.getfixturevalue(which))
    assert isinstance(detector, ZeroShotDetector)
    images = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    scores, boxes = detector.boxes(images, PHRASES)
    text = ["a red circle. blue square."] * 2 if which == "grounding_dino" else [["a red circle", "blue square"]] * 2
    inputs = detector.processor(images=to_pil(images), text=text, return_tensors="pt")
    with torch.no_grad():
        outputs = detector.model(**inputs)
    more = {"input_ids": inputs["input_ids"]} if which == "grounding_dino" else {}
    theirs = detector.processor.post_process_grounded_object_detection(
        outputs, threshold=-1.0, target_sizes=[(48, 80)] * 2, **more
    )
    for mine_scores, mine_boxes, their in zip(scores, boxes, theirs, strict=True):
        if which == "owlv2":
            torch.testing.assert_close(mine_scores.amax(-1), their["scores"])
            torch.testing.assert_close(mine_scores.gather(-1, their["labels"][:, None])[:, 0], their["scores"])
        else:  # theirs is the best of all tokens, separators included
            assert (mine_scores.amax(-1) <= their["scores"] + 1e-6).all() and (mine_scores > 0).all()
        pixels = torch.tensor([80, 48, 80, 48])
        torch.testing.assert_close(mine_boxes * pixels, their["boxes"].clamp_min(0).minimum(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("which", ["grounding_dino", "owlv2"])
def test_zero_shot_detections_do_not_depend_on_the_batch(which, request):
    detector = ZeroShotDetector(request.getfixturevalue(which), threshold=0.0, batch_size=2)
    images = torch.rand(4, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    phrases = [PHRASES, ["star"], PHRASES, PHRASES]
    together = detector.detect(images, phrases)
    alone = [detector.detect(images[i : i + 1], phrases[i : i + 1])[0] for i in range(4)]
    for found, same, wanted in zip(together, alone, phrases, strict=True):
        assert found and {f.phrase for f in found} <= set(wanted)
        assert all(0 <= f.box[0] < f.box[2] <= 1 and 0 <= f.box[1] < f.box[3] <= 1 and 0 <= f.score <= 1 for f in found)
        assert [f.phrase for f in found] == [f.phrase for f in same]
        np.testing.assert_allclose([f.box for f in found], [f.box for f in same], atol=1e-4)
        np.testing.assert_allclose([f.score for f in found], [f.score for f in same], atol=1e-4)


def test_phrases_are_scored_by_their_own_tokens(grounding_dino):
    """[CLS] a red circle . blue square . [SEP]: tokens 1-3 and 5-6; too many phrases for the text are an error."""
    detector = ZeroShotDetector(grounding_dino)
    ids = detector.processor.tokenizer("a red circle. blue square.")["input_ids"]
    logits = torch.arange(9.0)[None, None]
    assert len(ids) == 9 and detector._per_phrase(logits, ids, ["a red circle", "blue square"]).tolist() == [[[3, 6]]]
    with pytest.raises(ValueError, match="holds 1 of 2 phrases"):
        detector._per_phrase(logits[..., :4], ids, ["a red circle", "blue square"])


def test_a_zero_shot_detector_serves_the_rewards(owlv2):
    metadata = {"include": [{"class": "circle", "count": 1}, {"class": "star", "count": 1, "position": ["above", 0]}]}
    batch = samples(torch.rand(2, 3, 32, 64), [metadata, {}])
    for name in ("geneval", "layout"):
        scores = load_reward(name, detector=owlv2)(batch)
        assert 0 <= scores[0] <= 1 and scores[1].isnan()


def test_models_that_detect_nothing_by_name_are_refused(tmp_path):
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not load"):
        ZeroShotDetector(str(tmp_path))


def test_clip_names_the_colours_of_crops():
    """A CLIP that has learnt four colours from flat squares and GenEval's sentences reads them off boxes in a larger picture."""
    from transformers import CLIPConfig, CLIPModel

    from flowrl.reward_models.backbones import ClipBackbone
    from flowrl.tiny.models import make_tokenizer
    from flowrl.tiny.scenes import COLORS

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**small, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    clip = ClipBackbone(CLIPModel(config), tokenizer, [0.5] * 3, [0.5] * 3)
    colors = list(COLORS)
    squares = torch.tensor(list(COLORS.values()))[:, :, None, None].expand(-1, -1, 16, 16)
    names = ClipColors.COLORS
    targets = torch.tensor([names.index(color) for color in colors])
    optimizer = torch.optim.Adam(clip.parameters(), 2e-3)
    for step in range(60):
        template = ClipColors.TEMPLATES[step % 3]
        pictures = torch.nn.functional.normalize(clip.pictures(squares + 0.05 * torch.randn(6, 3, 16, 16)), dim=-1)
        texts = clip.texts([template.format(color=color, name="circle") for color in names])
        loss = torch.nn.functional.cross_entropy(10 * pictures @ torch.nn.functional.normalize(texts, dim=-1).T, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image = torch.full((3, 40, 60), 0.5)
    boxes = []
    for i, value in enumerate(COLORS.values()):
        image[:, 5:30, 10 * i : 10 * i + 10] = torch.tensor(value)[:, None, None]
        boxes.append((10 * i / 60, 5 / 40, (10 * i + 10) / 60, 30 / 40))
    assert ClipColors(clip)(image, boxes, "circle") == colors

    # As the reward's option: what the detector leaves open.
    class Blind:
        def detect(self, images, phrases):
            return [[Found("circle", boxes[i], 0.9)] for i in (0, 2)]

    batch = samples(image.expand(2, -1, -1, -1), [{"include": [{"class": "circle", "count": 1, "color": "red"}]}] * 2)
    assert GenEval(detector=Blind(), color=ClipColors(clip))(batch).tolist() == [1, 0]
