"""The comparison gallery in a real browser: the grid, its orders and filters, the open view, text of any kind, many pictures."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from scipy.stats import t

from flowrl.gallery import Table, write_gallery
from tests.gallery import HOSTILE, ROWS, cell, eventually, example_cells, lines, shape_picture

pytest_plugins = ["tests.browser"]  # the browser


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example, with a table."""
    table = Table("Held-out accuracy", ["kind", "base", "tuned"], [["counting", "0.58", "0.81 ± 0.02"]])
    out = tmp_path_factory.mktemp("gallery") / "example"
    return write_gallery(out, example_cells(), title="Shapes", subtitle="Before and after.", tables=[table])


# Text is read as textContent: innerText is empty in a row that has not been drawn since it moved.


def prompts(page: Any) -> list[str]:
    """The prompts on the page, from top to bottom."""
    return page.locator(".row h2").all_text_contents()


def row(page: Any, index: int) -> Any:
    """One row of the grid, with its pictures, which come when it nears the window."""
    found = page.locator(".row").nth(index)
    found.scroll_into_view_if_needed()
    found.locator(".set").first.wait_for(state="attached")
    return found


def seeds(page: Any, index: int) -> list[str]:
    """The seeds of one row, in order."""
    return row(page, index).locator(".seed").all_text_contents()


def order_of(*rows: int) -> list[str]:
    """The prompts of ROWS with these indices."""
    return [ROWS[row][0] for row in rows]


def test_grid_shows_every_prompt_with_its_pictures(show, gallery):
    page = show(gallery)
    assert page.title() == "Shapes"
    assert page.locator("h1").inner_text() == "Shapes"
    assert page.locator("#facts").inner_text() == "2 models · 5 prompts · 20 pictures"
    assert prompts(page) == order_of(0, 1, 2, 3, 4)
    assert seeds(page, 1) == ["seed 1", "seed 2"]
    first = page.locator(".row").nth(1).locator(".set").first
    alts = [img.get_attribute("alt") for img in first.locator("img").all()]
    assert alts == ["base, seed 1: two blue squares", "tuned, seed 1: two blue squares"]
    assert lines(first, ".reward") == ["verify 0.90", "aesthetic 22.00", "verify 0.40 ▼ −0.50", "aesthetic 22.00 ="]
    assert page.locator(".columns .set").first.locator(".model-name").all_inner_texts() == ["base", "tuned"]
    eventually(page, "[...document.images].slice(0, 4).every(i => i.complete && i.naturalWidth === 64)")
    assert page.evaluate("[...document.images].every(i => i.loading === 'lazy' && i.style.aspectRatio)")


def test_an_abstaining_reward_is_a_dash(show, gallery):
    page = show(gallery)
    assert lines(row(page, 4).locator(".set").nth(1), ".reward") == [
        "verify –",
        "aesthetic –",
        "verify 0.70",
        "aesthetic –",
    ]


def test_head_shows_tables_means_and_changes(show, gallery):
    page = show(gallery)
    page.locator("#tables summary").click()
    assert page.locator("#tables td").all_inner_texts() == ["counting", "0.58", "0.81 ± 0.02"]
    base = (0.5 + 0.5 + 0.9 + 0.2 + 0.1 + 0.3 + 0.6 + 0.6) / 8
    tuned = (0.5 + 0.5 + 0.4 + 0.8 + 1.0 + 0.4 + 0.5 + 0.61 + 0.7) / 9
    gain = (-0.5 + 0.6 + 0.9 + 0.1 - 0.1 + 0.01) / 8  # over the pairs in which both are known
    [first, second] = page.locator("#cards .card:first-child .reward").all()
    assert first.locator(".value").inner_text() == f"{base:.3f}"
    assert [second.locator(f".{part}").inner_text() for part in ("value", "delta")] == [f"{tuned:.3f}", f"▲ +{gain:.3f}"]


def test_intervals_are_paired_over_prompts(show, gallery):
    """Prompts are the units. Mean changes of verify: 0, 0.05, 0.5, -0.045 (the fifth has no pair); mean 0.12625, standard
    deviation 0.25217, t(3) = 3.182: 0.12625 +- 3.182 * 0.25217 / 2 = -0.275 to 0.527. Shares of wins: 1/2, 1/2, 1, 1/2; mean
    0.625, standard deviation 0.25: 0.625 +- 3.182 * 0.25 / 2 = 0.227 to 1.023, of which 1 is kept.
    """
    page = show(gallery)
    assert page.locator("#cards .card:first-child .tally span").all_inner_texts() == [
        "change −0.275 to +0.527",
        "wins 63 % (23 to 100 %)",
        "4 better, 2 worse, 2 equal",
    ]


def test_sort(show, gallery):
    page = show(gallery)
    orders = {
        "verify:loss": [1, 3, 0, 2, 4],
        "verify:gain": [2, 1, 3, 0, 4],
        "verify:low": [1, 2, 0, 3, 4],
        "verify:high": [2, 1, 4, 3, 0],
        "": [0, 1, 2, 3, 4],
    }
    for key, rows in orders.items():
        page.select_option("#sort", key)
        assert prompts(page) == order_of(*rows), key
        assert (f"sort={key.replace(':', '%3A')}" in page.url) == bool(key)


def test_sort_says_what_it_sorted_by_and_orders_seeds(show, gallery):
    page = show(gallery, "#sort=verify:gain")
    assert lines(page, ".key")[:2] == ["▲ +0.90 verify, tuned, seed 1", "▲ +0.60 verify, tuned, seed 2"]
    assert seeds(page, 1) == ["seed 2", "seed 1"]


def test_filter_search_and_only_changed(show, gallery):
    page = show(gallery)
    page.select_option("#kind", "counting")
    assert prompts(page) == order_of(1, 3)
    assert page.locator("#count").inner_text() == "2 of 5 prompts"
    page.fill("#search", "SQUARES red")
    eventually(page, "document.querySelectorAll('.row').length === 1")
    assert prompts(page) == order_of(3)
    page.fill("#search", "zebra")
    page.get_by_role("button", name="Show all").click()
    assert prompts(page) == order_of(0, 1, 2, 3, 4)
    assert page.locator("#search").input_value() == ""
    page.select_option("#only", "changed")
    assert prompts(page) == order_of(1, 2, 3, 4)
    assert seeds(page, 3) == ["seed 2"]
    page.select_option("#only", "verify:down")
    assert prompts(page) == order_of(1, 3)
    assert seeds(page, 0) == ["seed 1"]
    page.select_option("#only", "")
    assert seeds(page, 4) == ["seed 1", "seed 2"]


def test_quantiles_of_students_t(show, gallery):
    freedom = [1, 2, 3, 4, 5, 8, 20, 500]
    assert show(gallery).evaluate(f"{freedom}.map(student)") == pytest.approx(list(t.ppf(0.975, freedom)), rel=3e-3)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("verify<0.5", [1, 2]),  # of tuned: 0.4 in both
        ("verify>=0.7 verify<1", [1, 4]),
        ("Δverify>0.5 green", [2]),
        ("delta.verify=-0.5", [1]),
        ("verify<", []),  # words
        ("nothing<0.5", []),
    ],
)
def test_search_takes_conditions(show, gallery, words, rows):
    page = show(gallery, "#" + urlencode({"q": words}))
    assert prompts(page) == order_of(*rows)


def test_summary_follows_the_filter(show, gallery):
    page = show(gallery, "#kind=counting")
    assert lines(page, "#cards .card:first-child .reward")[0] == f"base {(0.9 + 0.2 + 0.6 + 0.6) / 4:.3f}"


def test_permalink_restores_the_view(show, gallery):
    page = show(gallery)
    page.select_option("#sort", "verify:loss")
    page.select_option("#kind", "counting")
    page.get_by_role("radio", name="Large pictures").check()
    page.locator(".picture").first.click()
    link = page.url
    other = show(gallery, "#" + link.split("#")[1])
    assert prompts(other) == order_of(1, 3)
    assert other.locator("#sort").input_value() == "verify:loss"
    assert other.locator("html").get_attribute("data-size") == "l"
    assert other.locator("#detail-prompt").inner_text() == "two blue squares"
    assert other.locator("#detail-facts").inner_text() == "counting · seed 1 · 1 of 4"
    other.evaluate("location.hash = ''")
    eventually(other, "!document.getElementById('detail').open && document.querySelectorAll('.row').length === 5")


def test_a_foreign_hash_is_harmless(show, gallery):
    page = show(gallery, "#sort=nothing&kind=nothing&model=nothing&size=%22&open=nothing&q=%E0%A4%A")
    assert page.locator("#sort").input_value() == ""
    assert not page.locator("#detail").is_visible()


def test_keyboard_walks_the_grid_and_the_detail_view(show, gallery):
    page = show(gallery)
    focused = "document.activeElement.getAttribute('aria-label')"
    page.locator("#sort").focus()
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "base, seed 1: a red circle"
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate(focused) == "base, seed 2: two blue squares"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == "tuned, seed 1: a red circle"

    page.keyboard.press("Enter")
    prompt, facts = page.locator("#detail-prompt"), page.locator("#detail-facts")
    assert page.locator("#stage figure").count() == 2
    assert facts.inner_text() == "single · seed 1 · 1 of 10"
    page.keyboard.press("ArrowLeft")  # nothing before the first
    page.keyboard.press("ArrowRight")
    assert facts.inner_text() == "single · seed 2 · 2 of 10"
    page.keyboard.press("ArrowDown")
    assert prompt.inner_text() == "two blue squares"
    assert facts.inner_text() == "counting · seed 1 · 3 of 10"
    page.keyboard.press("Escape")
    eventually(page, "!document.getElementById('detail').open")
    eventually(page, f"{focused} === 'base, seed 1: two blue squares'")  # the browser first gives focus back to the opener
    eventually(page, "!location.hash.includes('open=')")


def test_back_closes_the_detail_view(show, gallery):
    page = show(gallery)
    page.locator(".picture").nth(3).click()
    assert page.locator("#detail").is_visible()
    page.evaluate("history.back()")
    eventually(page, "!document.getElementById('detail').open")
    assert prompts(page) == order_of(0, 1, 2, 3, 4)


def test_detail_shows_tiny_pictures_large_with_their_details(show, gallery):
    page = show(gallery)
    page.locator(".picture").nth(5).click()
    image = page.locator("#stage img").first
    assert image.bounding_box()["width"] > 300
    assert image.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"
    figure = page.locator("#stage figure").nth(1)
    assert figure.locator("dd").all_inner_texts() == ["10", "flowrl sample 'two blue squares' --seed 1"]
    assert figure.get_by_role("button", name="Copy").is_visible()
    assert figure.locator("a").get_attribute("href").startswith("images/")
    page.mouse.click(3, 3)  # beside the view
    assert not page.locator("#detail").is_visible()


def test_hostile_text_is_shown_and_nothing_else(show, tmp_path):
    cells = [cell(prompt=prompt, model=model, details={"command": prompt, prompt: "x"}, kind=prompt, rewards={prompt: 0.5})
             for prompt in HOSTILE for model in ("base", "<img src=x onerror=window.hacked=1>")]  # fmt: skip
    table = Table(HOSTILE[0], [HOSTILE[1]], [[HOSTILE[0]]])
    page = show(write_gallery(tmp_path / "g", cells, title=HOSTILE[0], subtitle=HOSTILE[1], tables=[table]))
    assert page.evaluate("[...document.querySelectorAll('.row h2')].map(h => h.textContent)") == HOSTILE
    assert page.evaluate("getComputedStyle(document.querySelectorAll('.row h2')[4]).direction") == "rtl"
    for index in range(len(HOSTILE)):
        page.locator(".picture").nth(2 * index).click()
        page.keyboard.press("Escape")
    page.locator("#search").fill("<img src=x onerror=window.hacked=1>")
    page.wait_for_timeout(200)
    assert page.title() == HOSTILE[0]
    assert page.evaluate("window.hacked") is None
    assert page.locator("script").count() == 2


def test_missing_pictures_are_labelled(show, tmp_path):
    cells = [cell("base"), cell("tuned", image=tmp_path / "lost.png"), cell("tuned", seed=1)]
    path = write_gallery(tmp_path / "g", cells, title="T")
    next((path.parent / "images").glob("*-s1-*")).unlink()
    page = show(path, expected="ERR_FILE_NOT_FOUND")
    eventually(page, "document.querySelectorAll('.placeholder').length === 3")
    texts = page.locator(".placeholder").all_text_contents()
    assert texts[:2] == ["Missing file: lost.png", "No picture"]
    assert texts[2].startswith("Missing file: ")
    assert page.locator("img").count() == 1
    page.locator(".picture").nth(1).click()
    assert page.locator("#stage .placeholder").inner_text() == "Missing file: lost.png"


def test_empty_and_single_model_galleries(show, tmp_path):
    empty = show(write_gallery(tmp_path / "empty", [], title="T"))
    assert empty.locator("#empty").inner_text() == "This gallery holds no pictures."
    single = show(write_gallery(tmp_path / "single", [cell(rewards={"verify": 0.5})], title="T"))
    assert lines(single, ".cell .reward") == ["verify 0.50"]
    assert single.locator("#sort option").count() == 3
    assert not single.locator("#only").is_visible()
    assert not single.locator("#views").is_visible()


def luminance(page: Any, selector: str, name: str) -> float:
    """Relative luminance of a computed colour, 0 to 1."""
    text = page.locator(selector).first.evaluate("(node, name) => getComputedStyle(node)[name]", name)
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
              for v in (int(part) / 255 for part in re.findall(r"\d+", text)[:3])]  # fmt: skip
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_schemes_are_readable(show, gallery, scheme):
    page = show(gallery, color_scheme=scheme)
    paper = luminance(page, "body", "backgroundColor")
    assert (paper > 0.8) if scheme == "light" else (paper < 0.05)
    for selector in ("h1", ".subtitle", ".row h2", ".seed", ".reward .name", ".up .delta", ".down .delta", ".count"):
        ink = luminance(page, selector, "color")
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, selector


@pytest.mark.parametrize("models", [2, 5])
def test_a_phone_scrolls_sideways_in_the_grid_only(show, tmp_path, models):
    cells = [cell(f"step {m}", f"{'long ' * 20}{row}", rewards={"verify": 0.1 * m}) for row in range(3) for m in range(models)]
    table = Table("Wide", [f"column number {i}" for i in range(9)], [["0.123"] * 9])
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
    page = show(write_gallery(tmp_path / "g", cells, title="T" * 60, tables=[table]), **phone)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 390
    left = "document.querySelectorAll('.row .picture')[{}].getBoundingClientRect().left"
    overflow = page.evaluate("(g => g.scrollWidth - g.clientWidth)(document.getElementById('grid'))")
    assert (overflow > 300) == (models == 5)
    if models == 5:
        before = page.evaluate(left.format(0))
        page.evaluate("document.getElementById('grid').scrollLeft = 200")
        eventually(page, "document.getElementById('columns').scrollLeft === 200")
        assert page.evaluate(left.format(0)) == before  # the base stays in view
        assert page.evaluate(left.format(4)) < 390 + 350
    page.locator(".picture").first.tap()
    assert page.locator("#detail").bounding_box()["width"] == 390
    assert page.evaluate(width) == 390


def test_heads_stay_in_view(show, gallery):
    page = show(gallery)
    page.evaluate("window.scrollTo(0, 1200)")
    eventually(page, "document.querySelector('.columns').getBoundingClientRect().top < 120")
    assert page.locator(".columns").bounding_box()["y"] >= 0
    assert page.locator("#search").bounding_box()["y"] >= 0


SORT = """async (key) => {
    const sort = document.getElementById("sort");
    sort.value = key;
    sort.dispatchEvent(new Event("change"));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
}"""
SCROLL = """async () => {
    for (let step = 0; step < 30; step++) {
        scrollBy(0, 600);
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    }
    return scrollY;
}"""


def test_two_thousand_pictures_stay_responsive(show, gallery, tmp_path):
    """The page's own processor time, so that a busy machine does not matter; bounds are several times what it took."""
    pictures = [shape_picture(seed) for seed in range(20)]
    rng = random.Random(0)
    cells = (
        cell(model, f"prompt {number}", seed, image=rng.choice(pictures), rewards={"a": rng.random(), "b": rng.gauss(0, 1)})
        for number in range(500) for model in ("base", "tuned") for seed in (0, 1)
    )  # fmt: skip
    path = write_gallery(tmp_path / "g", cells, title="T", checkpoints={"base": ("run", 1), "tuned": ("run", 2)})
    page = show(gallery)
    metrics = page.context.new_cdp_session(page)
    metrics.send("Performance.enable", {"timeDomain": "threadTicks"})

    def work() -> float:
        """What the page's main thread has worked so far, in seconds."""
        found = {m["name"]: m["value"] for m in metrics.send("Performance.getMetrics")["metrics"]}
        return found["TaskDuration"]

    start = work()
    page.goto(path.as_uri())
    eventually(page, "document.querySelector('.row img')?.naturalWidth === 64")
    first = work() - start
    wall = page.evaluate("performance.now()") / 1000
    fetched = page.evaluate("[...document.images].filter(i => i.complete && i.naturalWidth).length")
    sorts = []
    for key in ("a:loss", "b:high", ""):
        start = work()
        page.evaluate(SORT, key)
        sorts.append(work() - start)
    start = work()
    assert page.evaluate(SCROLL) > 15_000
    frame = (work() - start) / 30
    assert page.locator(".row").count() == 500
    assert page.locator(".picture").count() < 1000, "pictures far from the window wait"
    views = []
    for key in "wfvg":
        start = work()
        page.keyboard.press(key)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        views.append(work() - start)
    print(f"2,000 pictures: first after {wall:.2f} s ({first:.2f} s of work, {fetched} fetched); an order {max(sorts):.2f} s; "
          f"a scrolled frame {1000 * frame:.0f} ms; another view {max(views):.2f} s")  # fmt: skip
    assert fetched < 200
    assert first < 2
    assert max(sorts) < 1
    assert frame < 0.1
    assert max(views) < 2
