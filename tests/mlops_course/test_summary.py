"""The summary page: what is not known is never fine, colours have words, and text stays text."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlops_course.monitoring import (
    SIGNS,
    Figure,
    Light,
    Limits,
    Plot,
    Point,
    Risk,
    Summary,
    draw_plot,
    light,
    render_summary,
    table,
    three_answers,
    together,
    trend,
)

NUMBERS = st.none() | st.floats(allow_nan=True, allow_infinity=False)
LIGHTS = st.sampled_from(list(SIGNS))
ORDER: tuple[Light, ...] = ("red", "unknown", "yellow", "green")


def figure(**fields: object) -> Figure:
    return Figure.model_validate({"name": "A number", "value": 1.0, "form": ".2f", **fields})


def facts(**fields: object) -> Summary:
    plot = Plot(title="A plot", axis="things", lines={"a": [Point("2026-11-01", 1.0), Point("2026-11-02", None)]})
    known: dict[str, object] = {
        "title": "How is it doing?",
        "release": "a1b2c3d-1.0.0-0f2e",
        "first": datetime(2026, 11, 1, tzinfo=UTC),
        "last": datetime(2026, 11, 8, tzinfo=UTC),
        "made_at": datetime(2026, 11, 8, 1, tzinfo=UTC),
        "seen": 0.5,
        "said": "This week: nothing.",
        "service": [figure(light="green")],
        "model": [figure(light="yellow")],
        "risks": [Risk(light="red", text="Something burns.", doing="Put it out.")],
        "plots": [plot],
    }
    return Summary.model_validate(known | fields)


@given(NUMBERS, st.sampled_from([Limits(1, 0), Limits(0, 1)]))
def test_a_light_follows_its_limits(value: float | None, limits: Limits) -> None:
    shade = light(value, limits)
    if value is None or math.isnan(value):
        assert shade == "unknown"
    else:
        more = limits.fine > limits.act
        good = value >= limits.fine if more else value <= limits.fine
        bad = value < limits.act if more else value > limits.act
        assert shade == ("green" if good else "red" if bad else "yellow")


@given(st.lists(LIGHTS))
def test_together_is_never_better_than_its_worst(lights: list[Light]) -> None:
    found = together(lights)
    assert found == min(lights, key=ORDER.index, default="unknown")


@pytest.mark.parametrize(
    ("value", "before", "better", "expected"),
    [
        (2, 1, "more", ("↑", "better")),
        (2, 1, "less", ("↑", "worse")),
        (1, 2, "more", ("↓", "worse")),
        (1, 2, "less", ("↓", "better")),
        (2, 1, "neither", ("↑", "higher")),
        (1, 1.05, "more", ("→", "about the same")),
        (None, 1, "more", ("", "")),
        (1, None, "more", ("", "")),
        (1, math.nan, "more", ("", "")),
    ],
)
def test_arrows(value: float | None, before: float | None, better: str, expected: tuple[str, str]) -> None:
    assert trend(figure(value=value, before=before, better=better, least=0.1)) == expected


def test_the_three_questions() -> None:
    found = {question: (shade, answer, reason) for question, shade, answer, reason in three_answers(facts())}
    assert found["Are we within our promises?"][:2] == ("green", "Yes")
    assert found["Is the model stable?"] == ("yellow", "It needs watching", "Because of: A number.")
    assert found["Are there known risks?"] == ("red", "Yes, urgent ones", "1 listed below, 1 urgent.")


@pytest.mark.parametrize("part", ["service", "model"])
def test_what_was_not_measured_is_not_fine(part: str) -> None:
    for figures in ([], [figure(light=None)], [figure(light="green"), figure(value=None, light="unknown")]):
        found = three_answers(facts(**{part: figures}))
        assert found[0 if part == "service" else 1][1] == "unknown"


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_is_well_formed_and_asks_nobody() -> None:
    page = Page(render_summary(facts(plots=[facts().plots[0], facts().plots[0].model_copy(update={"title": "B"})])))
    assert page.open == []
    asked = [value for _, found in page.tags for name, value in found.items() if name in ("src", "href", "xlink:href")]
    assert all(str(value).startswith("#") for value in asked)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids)), "two drawings share a name"
    assert {value[1:] for value in asked if value} <= set(ids)
    (html,) = (found for tag, found in page.tags if tag == "html")
    assert html["lang"] == "en"
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def test_every_colour_of_a_page_is_defined_for_day_and_night() -> None:
    text = render_summary(facts())
    day, night = re.findall(r":root\{([^}]*)\}", text)
    used = set(re.findall(r"var\(--([\w-]+)", text)) - {"light"}
    for theme in (day, night):
        assert used <= set(re.findall(r"--([\w-]+):", theme))


def luminance(colour: str) -> float:
    """Relative luminance of a colour, as WCAG defines it."""
    full = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    parts = [int(full[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["day", "night"])
@pytest.mark.parametrize("name", ["ink", "soft", "green", "yellow", "red", "unknown"])
def test_text_can_be_read_on_its_ground(name: str, theme: int) -> None:
    colours = dict(re.findall(r"--([\w-]+):(#\w+)", re.findall(r":root\{([^}]*)\}", render_summary(facts()))[theme]))
    for ground in ("paper", "card"):
        low, high = sorted(luminance(colours[one]) for one in (name, ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("shade", list(SIGNS))
def test_a_colour_never_comes_alone(shade: Light) -> None:
    text = render_summary(facts(model=[figure(light=shade)], service=[], risks=[], plots=[]))
    symbol, word = SIGNS[shade]
    body = text.partition("<main>")[2].partition("<footer>")[0]
    card = re.search(rf'<div class="card {shade}">.*?</div>', body, re.DOTALL)
    assert card
    assert symbol in card[0]
    assert word in card[0]


@given(st.text(alphabet="<>&\"'{}%$ab", min_size=1, max_size=20))
def test_text_stays_text(text: str) -> None:
    plain = facts(plots=[])
    strange = {"title": text, "release": text, "said": text, "risks": [Risk(light="red", text=text, doing=text)]}
    strange |= {"service": [figure(name=text, target=text, note=text, unit=text, light="green")]}
    page = Page(render_summary(plain.model_copy(update=strange)))
    same = Page(render_summary(plain.model_copy(update=strange | dict.fromkeys(("title", "release", "said"), "x"))))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in same.tags]
    assert page.open == []


def test_strange_names_can_be_drawn() -> None:
    odd = "<b>$x_1$ & \"y\"</b>"
    drawn = draw_plot(Plot(title=odd, axis=odd, lines={odd: [Point("2026-11-01", 1.0)], "b": []}, limits={odd: 2}))
    assert Page(drawn).open == []
    assert "<b>" not in drawn


def test_a_drawing_is_the_same_every_time() -> None:
    plot = Plot(title="A", axis="b", lines={"c": [Point("2026-11-01T10:00:00+00:00", 0.99, 0.98, 1.0)]}, percent=True)
    assert draw_plot(plot) == draw_plot(plot)


def test_the_numbers_behind_a_plot() -> None:
    lines = {"a": [Point("2026-11-02", 0.5, 0.4, 0.6)], "b": [Point("2026-11-01", None), Point("2026-11-02", 0.25)]}
    space = "\N{NO-BREAK SPACE}"
    assert table(Plot(title="t", axis="x", lines=lines, percent=True)) == [
        ("2026-11-01", ["no data", "no data"]),
        ("2026-11-02", [f"50.00{space}% (40.00{space}% to 60.00{space}%)", f"25.00{space}%"]),
    ]


def test_what_it_says_can_be_kept_and_drawn_again() -> None:
    kept = Summary.model_validate_json(facts().model_dump_json())
    assert render_summary(kept) == render_summary(facts())
