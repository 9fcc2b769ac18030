"""Judges, asked through the real protocol: a server process on loopback runs a small vision-language model (judge_server.py)."""

from __future__ import annotations

import itertools
import json
import math
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import quote

import pytest
import torch

from flowrl.batch import Prompt, Samples
from flowrl.reward_models.base import RewardError, load_reward, score, to_pil
from flowrl.reward_models.judge import Pairwise, PairwiseRubric, Reference, Rubric, YesNo
from flowrl.reward_models.judge_client import Answer, fill, picture
from flowrl.reward_models.judge_read import read_rubric, read_scores, read_winner, word_probability, yes_probability
from flowrl.reward_models.magic_mirror import SUB_WORDS, WORDS, Assessment
from tests.judge_server import TinyVLM, serve
from tests.runs import SERVER

NAN = math.nan
#: No waits, so that retries cost nothing.
QUICK = {"backoff": 0.001}
#: A judge of brightness, (dis)liking the first picture: P(first wins) = sigmoid(6 (mean of the first - of the second) + 2).
BIASED = "bright?gain=6&bias=2&words=A,B"
_names = itertools.count()
#: What an assessor writes of a normal picture.
BOX = r' \boxed{{"Whether Normal": true}}'


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a judge, without the version of its API."""
    ours, its = SERVER.Pipe()
    process = SERVER.Process(target=serve, args=(its.send,), daemon=True)
    process.start()
    its.close()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def url(server) -> str:
    return f"{server}/v1"


def seen(server: str, model: str) -> dict:
    """What a model of this name was asked."""
    with urllib.request.urlopen(f"{server}/seen?model={quote(model)}") as answer:
        return json.load(answer)


def new(model: str) -> str:
    """A name that nobody has used: the server counts by name."""
    return f"{model}{'&' if '?' in model else '?'}n={next(_names)}"


def samples(
    values: list[float], group: list[int] | None = None, references: list[list[float]] | None = None, **columns
) -> Samples:
    """Pictures of one grey each. columns: a list of values each, None where a prompt lacks it."""
    images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 8, 8).clone()
    group = group or [0] * len(values)
    prompts = [
        Prompt(f"prompt {g}", {name: column[i] for name, column in columns.items() if column[i] is not None})
        for i, g in enumerate(group)
    ]
    batch = Samples(prompts, [10 + i for i in range(len(values))], torch.tensor(group), torch.zeros(len(values), 1), images)
    if references is not None:
        batch.references = torch.tensor(references)[:, :, None, None, None].expand(-1, -1, 3, 8, 8).clone()
    return batch


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def grey(value: float) -> float:
    """What of a grey reaches the judge: 8 bits."""
    return round(value * 255) / 255


# ------------------------------------------------------------------------------------------------ reading


def log(**words: float) -> list[tuple[str, float]]:
    return [(word.replace("_", " "), math.log(p)) for word, p in words.items()]


def test_yes_is_the_sum_of_its_spellings():
    """P = (.3 + .1 + .1) / (.3 + .1 + .1 + .2 + .05); "yesterday" is another word."""
    candidates = log(Yes=0.3, _yes=0.1, YES=0.1, no=0.2, _No=0.05, yesterday=0.2)
    assert yes_probability(candidates) == pytest.approx(0.5 / 0.75)
    assert yes_probability(candidates, logit=True) == pytest.approx(math.log(0.5 / 0.25))
    assert yes_probability([("\u0120Yes", -1.0), ("\u2581no", -2.0)]) == pytest.approx(sigmoid(1))


def test_neither_word_is_no_answer():
    assert math.isnan(yes_probability(log(The=0.6, It=0.3))) and math.isnan(yes_probability([]))


def test_one_word_proves_no_more_than_the_list_does():
    """yes .6, The .3, I .06: "no" is at most the rest, .04. With a rest of .2, it is at most the rarest listed, .05.
    With the judge's whole probability on yes, the odds end at 1e9."""
    assert yes_probability(log(yes=0.6, The=0.3, I=0.06)) == pytest.approx(0.6 / 0.64)
    assert yes_probability(log(no=0.6, The=0.15, I=0.05)) == pytest.approx(0.05 / 0.65)
    assert yes_probability([("yes", 0.0)], logit=True) == pytest.approx(math.log(1e9))
    # What is not listed could not have said more: the true "no" is below the bound.
    full = log(yes=0.6, The=0.3, I=0.06, no=0.04)
    assert yes_probability(full) >= yes_probability(full[:-1]) - 1e-12


def test_one_letter_words_keep_their_case():
    candidates = log(A=0.2, _A=0.1, B=0.1, a=0.5)
    assert word_probability(candidates, "A", "B") == pytest.approx(0.75)
    assert word_probability(log(First=0.2, second=0.6), "first", "second") == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 1),
        ("Both are fine.\nAnswer: B", 0),
        ("The better one is A.", 1),
        ("B is better than A.", 0),
        ("It is a tie.", 0.5),
        ("A tie", 0.5),
        ('{"winner": "B"}', 0),
        ("<think>A is better</think><answer>B</answer>", 0),
        ("I like a picture", NAN),
        ("A or B", NAN),
        ("A is better. B is better.", NAN),
        ("", NAN),
        ("Bad", NAN),
    ],
)
def test_the_winner_in_the_last_line(text, value):
    assert read_winner(text, "A", "B") == pytest.approx(value, nan_ok=True)


def test_winners_by_longer_names():
    assert read_winner("Overall, image 2 is better than Image 1", "Image 1", "Image 2") == 0
    assert math.isnan(read_winner("Image 12 is better", "Image 1", "Image 2"))


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("Alignment Score (1-5): 4.5\nStyle Score (1-5): 1", {"Alignment": 4.5, "Style": 1.0}),
        ("**Alignment**: 3/5\n- style score: **2.25**.", {"Alignment": 3.0, "Style": 2.25}),
        ("<think>Alignment: 1</think>\nAlignment: 5\nStyle: 5", {"Alignment": 5.0, "Style": 5.0}),
        ("Alignment: 4\nAlignment: 4\nStyle: 2", {"Alignment": 4.0, "Style": 2.0}),
        ("Alignment: 4", None),
        ("Alignment: 5.9\nStyle: 3", None),
        ("Alignment: 0\nStyle: 3", None),
        ("Alignment: 45\nStyle: 3", None),
        ("Alignment: -4\nStyle: 3", None),
        ("Alignment: 4 or 5\nStyle: 3", None),
        ("Alignment: 4\nAlignment: 3\nStyle: 3", None),
        ("Alignment: 4/10\nStyle: 3", None),
        ("Alignment: nan\nStyle: 3", None),
    ],
)
def test_scores_in_lines(text, scores):
    assert read_scores(text, ["Alignment", "Style"]) == scores


def test_scores_on_another_scale_and_what_does_not_apply():
    """4 is the best of 1 to 4, and "4/5" is not on it; N/A is NaN, in any writing."""
    text = "faith: 4/4\ntext Score (1-4): N/A\nlook Score (1-4): **2.5**"
    scores = read_scores(text, ["faith", "text", "look"], (1, 4))
    assert (scores["faith"], scores["look"]) == (4.0, 2.5) and math.isnan(scores["text"])
    assert math.isnan(read_scores("text: not applicable.", ["text"])["text"])
    assert read_scores("faith: 4/5", ["faith"], (1, 4)) is None and read_scores("faith: 5", ["faith"], (1, 4)) is None


def flex(*winners: str, overall: str = "Image 1", names: str = "ABCD", **more) -> str:
    """A rubric's JSON in some prose."""
    categories = [{"name": name, "cat_winner": winner} for name, winner in zip(names, winners, strict=False)]
    return f"Well {{now}}: ```json\n{json.dumps({'categories': categories, 'winner': overall} | more)}\n``` done"


def test_a_rubric_by_its_letters():
    """A: 1, B: 2, C: tie, whatever they are called; and by their points, where no winner is named."""
    wins = (1.0, {"A": 1.0, "B": 0.0, "C": 0.5})
    assert read_rubric(flex("Image 1", "Image 2", "tie"), "Image 1", "Image 2") == wins
    prose = flex("first", "2", "Tie").replace('"A"', '"Category A"').replace('"B"', '"B. Overall look"')
    assert read_rubric(prose.replace('"C"', '"Aesthetics"'), "Image 1", "Image 2") == wins
    assert read_rubric("<think>" + flex("Image 2", "Image 2", "Image 2") + "</think>" + prose, "Image 1", "Image 2") == wins
    points = [
        {"name": name, "dims": [{"score_1": a, "score_2": 10 - a} for a in given]}
        for name, given in zip("ABC", [(9, 4), (0, 6.5), (5, 5)], strict=True)
    ]
    assert read_rubric(flex(categories=points), "Image 1", "Image 2") == wins
    four = read_rubric(flex("1", "2", "tie", "2", overall="2"), "Image 1", "Image 2")
    assert four == (0.0, {"A": 1.0, "B": 0.0, "C": 0.5, "D": 0.0})


@pytest.mark.parametrize(
    "text",
    [
        "no JSON",
        '{"categories": "none", "winner": "Image 1"}',
        '{"categories": [1, 2, 3], "winner": "Image 1"}',
        flex("1", "2", "tie", overall="Image 3"),
        flex("1", "2", "tie", winner=True),
        flex("1", "2"),
        flex("1", "2", "tie", names="ABB"),
        flex("1", "2", "maybe"),
        flex("1", "2", "tie")[:-20],
        flex(categories=[{"name": n, "dims": [{"score_1": 9, "score_2": 9}]} for n in "ABC"]),
        flex(categories=[{"name": n, "dims": [{"score_1": 11, "score_2": -1}]} for n in "ABC"]),
        flex(categories=[{"name": n, "dims": []} for n in "ABC"]),
        '{"categories":' * 1500,
    ],
)
def test_what_is_no_rubric(text):
    assert read_rubric(text, "Image 1", "Image 2") is None


def test_questions_are_filled_once():
    prompt = Prompt("a {color} cat", {"color": "red", "n": 2, "missing": None})
    assert fill('{prompt}: {n} {color}, {"a": [{}]}', prompt) == 'a {color} cat: 2 red, {"a": [{}]}'
    assert fill("{missing}", prompt) is None and fill("{other}", prompt) is None
    assert fill("{color}", prompt, color="blue") == "blue"


def test_the_frames_of_a_clip():
    """Of 9 frames, 3: the first, the middle, the last; of 2, both."""
    clip = torch.linspace(0, 1, 9)[:, None, None, None].expand(9, 3, 4, 4)
    assert picture(clip, 3) == picture(clip[[0, 4, 8]], 8)
    assert len(picture(clip[:2], 8).frames) == 2 and len(picture(clip, 1).frames) == 1


# ------------------------------------------------------------------------------------------------ the protocol


def test_the_probability_is_the_models(url):
    """The same model in this process, on the same pixels: P(yes) and P(no) from its whole vocabulary."""
    model = TinyVLM()
    torch.manual_seed(0)
    batch = samples([0.0, 0.0, 0.0, 1.0])
    batch.images[:3] = torch.rand(3, 3, 40, 24)[..., :8, :8]
    question = "Is there a {prompt}? Answer yes or no."
    expected = []
    for image, text in zip(to_pil(batch.images), batch.texts, strict=True):
        p = model.log_probs([image], f"<image>\nIs there a {text}? Answer yes or no.\n").exp()
        yes, no = (
            sum(p[i].item() for i, name in enumerate(model.names) if name.strip().lower() == word) for word in ("yes", "no")
        )
        expected.append(yes / (yes + no))
    assert max(expected) - min(expected) > 0.1, "the judge tells the pictures apart"
    reward = load_reward("judge", url=url, question=question)
    torch.testing.assert_close(score({"j": reward}, batch)[:, 0], torch.tensor(expected), atol=1e-5, rtol=0)
    inverted = load_reward(f"judge url={url} invert=true question='{question}'")
    torch.testing.assert_close(inverted(batch), 1 - torch.tensor(expected), atol=1e-5, rtol=0)
    logits = YesNo(url=url, model="tiny", question=question, logit=True)(batch)
    torch.testing.assert_close(logits.sigmoid(), torch.tensor(expected), atol=1e-5, rtol=0)
    assert reward.model == "tiny" and reward.asked == 4 and reward.unread == 0


def test_what_is_asked(server, url, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "s3cret")
    model = new("tiny?token=s3cret")
    reward = YesNo(url=url + "/", model=model, token_env="JUDGE_TOKEN", extra={"seed": 1, "temperature": None})
    reward(samples([0.5]))
    told = seen(server, model)
    body = told["body"]
    content = body["messages"][0].pop("content")
    assert told["authorization"] == "Bearer s3cret"
    assert body == {
        "model": model,
        "messages": [{"role": "user"}],
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 20,
        "seed": 1,
    }
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert content[1]["text"] == "Does this figure show 'prompt 0'? Please answer yes or no."
    assert "s3cret" not in repr(reward).replace(model, "")
    with pytest.raises(RewardError, match="401: who are you.*token_env") as error:
        YesNo(url=url, model=model)(samples([0.5]))
    assert "s3cret" not in str(error.value)


def test_a_clip_is_its_frames(server, url):
    model = new("tiny")
    batch = samples([0.5])
    batch.images = torch.rand(1, 5, 3, 8, 8)
    YesNo(url=url, model=model, frames=3)(batch)
    content = seen(server, model)["body"]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "image_url", "image_url", "text"]


def test_artifacts_are_bad(url):
    """Twice as much "yes, there are" as "no": 1/3. The question is not the prompt's."""
    reward = YesNo(url=url, model=new("x?first=Yes:.4, no:.2"), question="artifact")
    assert reward(samples([0.5])).item() == pytest.approx(1 / 3)
    assert "{" not in reward.question
    same = YesNo(url=url, model=new("x?first=Yes:.4, no:.2"), question="artifact", logit=True)
    assert same(samples([0.5])).item() == pytest.approx(-math.log(2))


def test_prompts_without_the_column_abstain_unasked(server, url):
    model = new("x?first=yes:.9,no:.1")
    reward = YesNo(url=url, model=model, question="Is it {color}?")
    values = reward(samples([0.1, 0.2, 0.3], color=["red", None, "blue"]))
    assert values[1].isnan() and values[[0, 2]].tolist() == pytest.approx([0.9, 0.9])
    assert seen(server, model)["requests"] == 2 and reward.traits.columns == ("color",)
    assert reward(samples([0.1])).isnan().all()  # nobody was asked, so nobody failed


def test_many_at_once(server, url):
    """24 questions of 0.05 s, 8 at once: three rounds, in the order of the samples."""
    model = new("bright?gain=3&slow=0.05")
    values = [i / 24 for i in range(24)]
    start = time.perf_counter()
    scores = YesNo(url=url, model=model, concurrency=8)(samples(values))
    assert time.perf_counter() - start < 24 * 0.05
    assert scores.tolist() == pytest.approx([sigmoid(3 * (grey(v) - 0.5)) for v in values], abs=1e-6)
    assert 4 <= seen(server, model)["most_at_once"] <= 8


# ------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    "fault", ["status=500&times=2", "status=503&times=1", "status=408&times=1", "reset=2", "status=429&times=1&retry_after=0"]
)
def test_what_may_pass_is_tried_again(server, url, fault):
    model = new(f"x?first=yes:.9,no:.1&{fault}")
    reward = YesNo(url=url, model=model, **QUICK)
    assert reward(samples([0.5])).item() == pytest.approx(0.9)
    assert seen(server, model)["requests"] == (2 if "=1" in fault else 3)


def test_the_server_says_when(url):
    start = time.perf_counter()
    YesNo(url=url, model=new("tiny?status=429&times=1&retry_after=1"), **QUICK)(samples([0.5]))
    assert time.perf_counter() - start >= 1


@pytest.mark.parametrize(
    ("fault", "requests", "message"),
    [
        ("status=500", 3, r"chat/completions failed after 3 attempts in .* s: it answers 500: not now"),
        ("status=400", 1, r"failed: it answers 400: not now"),
        ("status=404", 1, r"404: not now; check the address and the name"),
        ("slow=2", 2, r"no answer within 0.3 s; raise timeout"),
        ("reset=9", 3, r"the connection broke"),
        ("body=html", 3, r"not JSON but begins '<html>"),
        ("body=list", 1, r"something else than a chat completion: \[1, 2, 3\]"),
        ("body=two", 1, r"something else than a chat completion"),
        ("logprobs=none", 1, r"returned no log-probabilities .*; use a server that has them"),
    ],
)
def test_failures_say_where_and_what_helps(server, url, fault, requests, message):
    model = new(f"tiny?{fault}")
    slow = {"timeout": 0.3, "retries": 1} if "slow" in fault else {"retries": 2}
    with pytest.raises(RewardError, match=message) as error:
        YesNo(url=url, model=model, **QUICK, **slow)(samples([0.5]))
    assert "http://127.0.0.1" in str(error.value)
    assert seen(server, model)["requests"] == requests


def test_nobody_listens():
    with pytest.raises(RewardError, match="http://127.0.0.1:9/v1/models failed.*nothing listens there; start the server"):
        YesNo(url="http://127.0.0.1:9/v1", retries=1, **QUICK)(samples([0.5]))


def test_which_of_two_models(server):
    with pytest.raises(RewardError, match=r"has 2 models \(small, large\); choose one with `model`"):
        YesNo(url=f"{server}/two")(samples([0.5]))


def test_an_unreadable_answer_abstains_and_is_counted(url):
    reward = YesNo(url=url, model=new("bright?gain=1&mute=.7"))
    values = reward(samples([0.2, 0.8, 0.5]))
    assert values.isnan().tolist() == [False, True, False] and (reward.asked, reward.unread) == (3, 1)


@pytest.mark.parametrize(
    ("model", "excerpt"),
    [
        ("x?first=The:.6, I:.3", r"'The' 0.60, ' I' 0.30"),
        ("tiny?body=null&logprobs=empty", r"none could be read; the first: ''"),
    ],
)
def test_when_nothing_can_be_read(url, model, excerpt):
    with pytest.raises(RewardError, match=excerpt):
        YesNo(url=url, model=new(model))(samples([0.5, 0.6]))


def test_the_true_model_knows_no_rubric(url):
    """Random weights write noise: all of a call's answers unreadable is an error that shows some of it."""
    with pytest.raises(RewardError, match="2 answers and none could be read; the first: '.+question"):
        Rubric(url=url, max_tokens=4)(samples([0.5, 0.6]))


# ------------------------------------------------------------------------------------------------ comparisons


def expected_wins(values: list[float]) -> torch.Tensor:
    """Win rates by the biased judge of brightness, both orders: w_ij = (sigmoid(d + 2) + 1 - sigmoid(-d + 2)) / 2."""
    w = [[(sigmoid(6 * (grey(a) - grey(b)) + 2) + 1 - sigmoid(6 * (grey(b) - grey(a)) + 2)) / 2 for b in values] for a in values]
    return torch.tensor([(sum(row) - 0.5) / (len(values) - 1) for row in w])


def test_both_orders_cancel_the_bias(url):
    values = [0.2, 0.8, 0.5, 0.5]
    rates = Pairwise(url=url, model=BIASED)(samples(values))
    torch.testing.assert_close(rates, expected_wins(values))
    assert rates.mean().item() == pytest.approx(0.5, abs=1e-7)
    assert rates[2] == rates[3]
    same = Pairwise(url=url, model=BIASED)(samples([0.3] * 3))
    assert same.tolist() == [0.5] * 3, "equal pictures, exactly 1/2, however much the judge likes the first"


def test_one_order_keeps_the_bias_and_asks_half(server, url):
    models = [new(BIASED), new(BIASED)]
    both, once = (Pairwise(url=url, model=m, order=o) for m, o in zip(models, ("both", "random"), strict=True))
    both(samples([0.3] * 4))
    rates = once(samples([0.3] * 4))
    assert [seen(server, model)["requests"] for model in models] == [12, 6]
    assert rates.mean().item() == pytest.approx(0.5) and rates.std() > 0.05
    assert torch.equal(once(samples([0.3] * 4)), rates), "the coins depend on seeds alone"


@pytest.mark.parametrize("options", [{}, {"order": "random"}, {"opponents": 2}, {"opponents": 2, "strength": "bradley_terry"}])
def test_places_in_the_batch_do_not_matter(url, options):
    values, group = [0.2, 0.8, 0.5, 0.4, 0.9, 0.1, 0.6, 0.3], [0, 1, 0, 1, 0, 1, 0, 0]
    batch = samples(values, group)
    reward = Pairwise(url=url, model=BIASED, **options)
    order = torch.tensor([5, 2, 7, 0, 3, 1, 6, 4])
    torch.testing.assert_close(reward(batch.select(order)), reward(batch)[order], atol=1e-6, rtol=0)


def test_groups_do_not_meet(server, url):
    """Groups of 3 and 2 and one alone: 3 + 1 pairs, both orders."""
    model = new(BIASED)
    rates = Pairwise(url=url, model=model)(samples([0.2, 0.9, 0.4, 0.8, 0.6, 0.5], [0, 1, 0, 1, 0, 2]))
    assert seen(server, model)["requests"] == 8 and rates[5].isnan()
    torch.testing.assert_close(rates[[0, 2, 4]], expected_wins([0.2, 0.4, 0.6]))
    torch.testing.assert_close(rates[[1, 3]], expected_wins([0.9, 0.8]))


def test_few_opponents(server, url):
    """Six samples, two opponents each: 6 pairs, in both orders 12 questions instead of 30."""
    model = new(BIASED)
    values = [0.1, 0.2, 0.4, 0.5, 0.7, 0.9]
    strengths = Pairwise(url=url, model=model, opponents=2, strength="bradley_terry")(samples(values))
    assert seen(server, model)["requests"] == 12
    assert strengths.argsort().tolist() == list(range(6)) and strengths.mean().abs() < 1e-6


@pytest.mark.parametrize(("fault", "unread"), [("mute=.85", 6), ("mute_first=.85", 3)])
def test_a_sample_that_cannot_be_judged_leaves_the_others_as_they_were(url, fault, unread):
    """Not at all, or in one of the two orders only: that one alone would be biased."""
    muted = Pairwise(url=url, model=new(f"{BIASED}&{fault}"))
    rates = muted(samples([0.2, 0.9, 0.5, 0.4]))
    assert rates[1].isnan() and muted.unread == unread
    torch.testing.assert_close(rates[[0, 2, 3]], expected_wins([0.2, 0.5, 0.4]))


def test_a_winner_in_text(server, url):
    """The brighter of two wins, by the judge's words: 0, 1, 1/2."""
    model = new("x?text=Image 1 has light, Image 2 too.%0AThe winner is WINNER.")
    reward = Pairwise(url=url, model=model, answer="text", words=("Image 1", "Image 2"))
    assert reward(samples([0.2, 0.8, 0.5])).tolist() == [0.0, 1.0, 0.5]
    body = seen(server, model)["body"]
    assert body["max_tokens"] == 1024 and "logprobs" not in body


def test_a_rubric_of_pairs(url):
    """The brighter wins overall, A is always Image 1's, B the brighter's, C a tie: over both orders A is worth 1/2 as well, so
    the brighter has (1 + (1/2 + 1 + 1/2) / 3) / 2 = 5/6; with w_o = 3, (3 + 2/3) / 4 = 11/12. A twice is unreadable."""
    text = flex("Image 1", "WINNER", "tie", overall="WINNER")
    rates = PairwiseRubric(url=url, model=new(f"x?text={quote(text)}"))(samples([0.2, 0.8]))
    assert rates.tolist() == pytest.approx([1 / 6, 5 / 6])
    weighted = PairwiseRubric(url=url, model=new(f"x?text={quote(text)}"), weights={"overall": 3})(samples([0.2, 0.8]))
    assert weighted.tolist() == pytest.approx([1 / 12, 11 / 12])
    with pytest.raises(RewardError, match="none could be read"):
        PairwiseRubric(url=url, model=new(f"x?text={quote(text.replace('B', 'A'))}"))(samples([0.2, 0.8]))


def test_a_rubric_of_scores(server, url):
    """4.5 and 2 of 5: ((3.5 + 1) / 4) / 2 = 0.5625; with weights 3 and 1, (3 * 3.5 + 1) / 16 = 0.71875."""
    model = new(f"x?text={quote('Fine.%0ALook Score (1-5): 4.5%0AStyle Score (1-5): 2', safe='%')}")
    assert Rubric(url=url, model=model, dimensions=["Look", "Style"])(samples([0.5])).item() == 0.5625
    weighted = Rubric(url=url, model=model, dimensions=["Look", "Style"], weights={"Look": 3})
    assert weighted(samples([0.5])).item() == 0.71875
    question = seen(server, model)["body"]["messages"][0]["content"][-1]["text"]
    assert question.endswith("Look Score (1-5): <number>\nStyle Score (1-5): <number>") and "from 1 (worst) to 5" in question


def test_a_rubric_on_another_scale(server, url):
    """4 and 2 of 1 to 4, and one that does not apply: (1 + 1/3) / 2; with all the weight on the latter the sample abstains."""
    model = new(f"x?text={quote('faith: 4%0Alook: 2%0Atext: N/A', safe='%')}&mute=.9")
    options = {"url": url, "model": model, "dimensions": ["faith", "look", "text"], "scale": [1, 4]}
    rubric = load_reward("rubric", **options)
    values = rubric(samples([0.5, 0.95]))
    assert values[0].item() == pytest.approx(2 / 3) and values[1].isnan() and rubric.unread == 1
    question = seen(server, model)["body"]["messages"][0]["content"][-1]["text"]
    assert "from 1 (worst) to 4 (best)" in question and question.endswith("text Score (1-4): <number>")
    nothing = {"weights": {"faith": 0, "look": 0}}
    assert math.isnan(load_reward("rubric", **options, **nothing).value(Answer("faith: 4\nlook: 2\ntext: N/A")))


def test_an_assessor_names_kinds(server, url):
    """A hand and an object: 1 - (1 + 1) / 4.5; at other costs 1 - 0.5 / 3; an answer in another form abstains."""
    found = Assessment.of("human/hand", "object")
    text = f"<think>Six fingers.</think> \\boxed{{{found.json}}}"
    model = new(f"x?text={quote(text)}&mute=.9")
    assessor = load_reward("assessor", url=url, model=model)
    batch = samples([0.5, 0.95])
    values = score({"a": assessor}, batch)[:, 0]
    assert values[0].item() == pytest.approx(1 - 2 / 4.5) and values[1].isnan() and (assessor.asked, assessor.unread) == (2, 1)
    assert assessor.assess(batch) == [found, None]
    costs = {"human": 0.5, "object": 0, "animal": 1}
    assert load_reward("assessor", url=url, model=model, costs=costs)(batch)[0].item() == pytest.approx(1 - 0.5 / 3)
    body = seen(server, model)["body"]
    question = body["messages"][0]["content"][-1]["text"]
    assert body["max_tokens"] == 2048 and "logprobs" not in body and "{labels}" not in question
    assert all(word in question for word in (*WORDS.values(), *SUB_WORDS.values()))
    normal = load_reward("assessor", url=url, model=new(f"x?text={quote('<think>Fine.</think>' + BOX)}"))
    assert normal(batch).tolist() == [1.0, 1.0]
    with pytest.raises(RewardError, match="'assessor'.*2 answers and none could be read; the first: 'I cannot say"):
        load_reward("assessor", url=url, model=new("x?text=I cannot say."))(batch)
    asked_of_hands = load_reward("assessor", url=url, model=model, question="Look at the {part}. {labels}")
    assert asked_of_hands.assess(samples([0.5, 0.5], part=["hands", None])) == [found, None]


# ------------------------------------------------------------------------------------------------ references


def versus(sample: float, reference: float, bias: float = 1.0) -> float:
    """Better than a reference by the judge with P(yes) = sigmoid(-5 (first - second) + bias), both orders."""
    d = 5 * (grey(sample) - grey(reference))
    return (sigmoid(d + bias) + 1 - sigmoid(-d + bias)) / 2


YES = "bright?gain=-5&bias=1&words=yes,no"


def test_better_than_references(url):
    """Two references per sample; the bias towards "yes" cancels; as good as its references is 1/2."""
    batch = samples([0.7, 0.4, 0.3], references=[[0.2, 0.5], [0.4, 0.4], [0.9, 0.9]])
    values = score({"r": load_reward("reference_judge", url=url, model=YES)}, batch)[:, 0]
    expected = [(versus(0.7, 0.2) + versus(0.7, 0.5)) / 2, 0.5, versus(0.3, 0.9)]
    assert values.tolist() == pytest.approx(expected, abs=1e-6) and values[1] == 0.5
    once = Reference(url=url, model=YES, order="random")(batch)
    assert once[1] != 0.5 and once.isfinite().all()


@pytest.mark.parametrize("fault", ["mute=.9", "mute_first=.9"])
def test_references_that_cannot_be_compared_with(url, fault):
    """Of two references one is unreadable, in both orders or in one: the other counts. Both: the sample abstains."""
    batch = samples([0.7, 0.4], references=[[0.2, 0.95], [0.95, 0.95]])
    values = Reference(url=url, model=new(f"{YES}&{fault}"))(batch)
    assert values[0].item() == pytest.approx(versus(0.7, 0.2), abs=1e-6) and values[1].isnan()


def test_several_tasks(server, url):
    """A prompt's `task` chooses among the tasks; without one all count; with none of them it abstains, unasked."""
    model = new(YES)
    tasks = {"fill": "Look at the filled part.", "text": "Read the letters."}
    reward = Reference(url=url, model=model, tasks=tasks, weights={"text": 3})
    batch = samples([0.7] * 4, references=[[0.2]] * 4, task=["fill", ["text", "fill"], None, "outpaint"])
    values = reward(batch)
    assert values[:3].tolist() == pytest.approx([versus(0.7, 0.2)] * 3, abs=1e-6) and values[3].isnan()
    assert seen(server, model)["requests"] == 2 * (1 + 2 + 2)


def test_tasks_are_weighted(url):
    """The instruction turns the judge: one task sees the gap of brightness with gain 5, the other, of weight 3, with 1."""
    tasks = {"fill": "gain=-5", "text": "gain=-1"}
    reward = Reference(url=url, model=YES, question="{instruction}", tasks=tasks, weights={"text": 3})
    values = reward(samples([0.7, 0.7], references=[[0.2], [0.2]], task=[None, "fill"]))
    gap = grey(0.7) - grey(0.2)
    fill_, text = (versus(0.7, 0.2), (sigmoid(gap + 1) + 1 - sigmoid(-gap + 1)) / 2)
    assert values.tolist() == pytest.approx([(fill_ + 3 * text) / 4, fill_], abs=1e-6)


def test_references_are_asked_for(url):
    with pytest.raises(RewardError, match="needs references"):
        score({"r": Reference(url=url, model=YES)}, samples([0.5]))


# ------------------------------------------------------------------------------------------------ options

HERE = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("judge", {}, "wants url"),
        ("judge", {"url": HERE, "colour": 1}, "has no option 'colour'"),
        ("judge", {"url": "localhost:8000"}, "url='localhost:8000': the server's address, like http"),
        ("judge", {"url": HERE, "question": "artefact"}, "question='artefact': a question, or one of vqa, artifact"),
        ("judge", {"url": HERE, "concurrency": 0}, "concurrency=0: at least 1"),
        ("judge", {"url": HERE, "timeout": 0}, "timeout=0: seconds, more than 0"),
        ("judge", {"url": HERE, "token_env": "NOT_SET_ANYWHERE"}, "token_env=NOT_SET_ANYWHERE: this variable is not set"),
        ("pairwise", {"url": HERE, "order": "first"}, "order='first': choose both or random"),
        ("pairwise", {"url": HERE, "opponents": 0}, "opponents=0: at least 1"),
        ("rubric", {"url": HERE, "weights": {"Taste": 1}}, "weights: 'Taste' is not among Alignment, Coherence, Style"),
        ("rubric", {"url": HERE, "scale": [5, 1]}, r"scale=\[5.0, 1.0\]: the worst and the best score"),
        ("assessor", {"url": HERE, "costs": {"hands": 1}}, "costs: 'hands' is not among human, animal, object"),
        ("assessor", {"url": HERE, "costs": {"human": -1}}, "costs: human=-1 must not be negative"),
        ("reference_judge", {"url": HERE, "tasks": {}}, "tasks: at least one"),
        ("reference_judge", {"url": HERE, "weights": {"overall": 0}}, "weights: at least one must be above 0"),
        ("reference_judge", {"url": HERE, "weights": {"overall": -1}}, "weights: overall=-1 must not be negative"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        load_reward(name, **options)


def test_what_they_say_about_themselves():
    traits = {name: load_reward(name, url=HERE).traits for name in ("judge", "pairwise", "reference_judge", "rubric", "assessor")}
    assert all(t.remote and t.range == (0.0, 1.0) and t.columns == () for t in traits.values())
    assert [t.arity for t in traits.values()] == ["point", "group", "point", "point", "point"]
    assert traits["reference_judge"].needs == ("images", "references")
