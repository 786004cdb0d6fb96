"""What the screen shows of a state, at any size."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from rlhf_cli.data.records import Message
from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS, Entry, Growth, LabelTask, SessionProgress
from rlhf_cli.labeling.terminal.app import Outcome, closing_lines
from rlhf_cli.labeling.terminal.controller import VisitCounts
from rlhf_cli.labeling.terminal.drawing import Screen, draw, scroll_area
from rlhf_cli.labeling.terminal.editing import Line
from rlhf_cli.labeling.terminal.guide import guide_rows
from rlhf_cli.labeling.terminal.key_bindings import step
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.layout import columns_for, document
from rlhf_cli.labeling.terminal.painting import paint
from rlhf_cli.labeling.terminal.state import Effect, Failure, State, with_failure, with_task
from rlhf_cli.labeling.terminal.visible import in_one_line
from tests.labeling.terminal.terminal_support import TEXTS

PROGRESS = SessionProgress(40, 11, 0, 11, 29, False, mine=11, left_for_me=29, pace_seconds=38.2)


def at_task(*answers: str, prompt="Why is my bread so heavy?", draft: Entry | None = None, **plan) -> State:
    state = State(LabelPlan(**plan), "Maria", PROGRESS)
    return with_task(state, LabelTask(12, 12, prompt, answers, LabelPlan().display_hash, draft))


def text_of(screen: Screen) -> list[str]:
    """Rows as they are seen."""
    shown = []
    for row in screen.rows:
        line = ""
        for piece in row:
            if piece.at is not None:
                assert cell_len(line) <= piece.at, "one text over another"
                line += " " * (piece.at - cell_len(line))
            line += piece.text
        shown.append(line.rstrip())
    return shown


def shown(state: State, width: int = 80, height: int = 24) -> str:
    return "\n".join(text_of(draw(state, width, height)))


@st.composite
def states(draw_):
    count = draw_(st.integers(2, 16))
    texts = draw_(st.lists(TEXTS, min_size=count, max_size=count))
    prompt = draw_(TEXTS | st.lists(st.builds(Message, TEXTS, TEXTS), min_size=1, max_size=3).map(tuple))
    order = draw_(st.permutations(range(count)))[: draw_(st.integers(0, count))]
    tiers = tuple((answer,) for answer in order)
    if len(tiers) > 2:
        tiers = (tiers[0] + tiers[1], *tiers[2:])
    criteria = tuple(draw_(st.lists(st.sampled_from(["helpful", "honest", "h" * 30]), unique=True)))
    plan = {"criteria": criteria, "strengths": draw_(st.booleans()), "guidelines": draw_(st.none() | TEXTS)}
    state = at_task(*texts, prompt=prompt, draft=Entry(tiers, note=draw_(TEXTS)), **plan)
    views = ["rank", "note", "flag", "help", "end", "failure", *(["marks"] if criteria else [])]
    state = replace(state, view=draw_(st.sampled_from(views)), top=draw_(st.integers(0, 99)))
    line = draw_(TEXTS)
    state = replace(state, line=Line(line, draw_(st.integers(0, len(line)))), is_joining=bool(tiers), name=draw_(TEXTS))
    failure = Failure(draw_(TEXTS), draw_(TEXTS), Effect("quit"))
    state = with_failure(state, failure) if state.view == "failure" else replace(state, hint=draw_(TEXTS | st.just("")))
    return replace(state, task=None) if state.view == "end" else state


@settings(max_examples=150, deadline=None)
@given(states(), st.integers(1, 200), st.integers(1, 60))
def test_no_row_is_wider_than_the_terminal_and_no_text_of_a_stranger_is_obeyed(state, width, height):
    screen = draw(state, width, height)
    assert len(screen.rows) == height
    assert all(cell_len(row) <= width for row in text_of(screen))
    assert all(piece.text.isprintable() or not set(piece.text) & _OBEYED for row in screen.rows for piece in row)
    if screen.cursor is not None:
        assert screen.cursor[0] < height
        assert screen.cursor[1] < width
    if width >= 60 and height >= 12 and state.view != "help":
        assert re.match(r" (Enter|1-5|[a-z-]+ rank)", text_of(screen)[-1]), "the keys are always there"
        assert state.view not in ("note", "flag") or screen.cursor is not None
    painted, _ = paint(screen, (), is_colored=True)
    ours = re.compile(r"\x1b\[(\?25[lh]|[0-9;]*[mHGK]|2J)")
    assert "\x1b" not in ours.sub("", painted)


_OBEYED = {chr(code) for code in (*range(32), *range(0x7F, 0xA0), 0x202E, 0x2066, 0x200B)}


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_help_explains_more_tasks_than_prompts(width):
    state = replace(at_task("a", "b"), view="help")
    assert "twice" not in shown(state, width)
    state = replace(state, progress=replace(PROGRESS, hidden=2))
    text = " ".join(shown(state, width, 60).split())
    assert "40 tasks: 38 prompts, 2 of them twice to measure your consistency." in text
    assert "best to worst" in text
    screens = [shown(replace(state, help_top=top), width, 12) for top in range(scroll_area(state, width, 12).last + 1)]
    assert any("quit; your entries" in screen for screen in screens), "the end is reached by scrolling"


CUT_OFF = "cut off at the limit of 64 tokens"


@pytest.mark.parametrize("width", [80, 120])
def test_an_answer_that_was_cut_off_says_so_beside_its_letter(width):
    state = at_task("Let the dough rise.", "Add water, becau")
    assert state.task is not None
    marked = replace(state, task=replace(state.task, endings=("", CUT_OFF)))
    assert CUT_OFF not in shown(state, width)
    lines = shown(marked, width).splitlines()
    (at,) = [number for number, line in enumerate(lines) if f"  b   ({CUT_OFF})" in line]
    below = [line.find("Add water") for line in lines[at:] if "Add water" in line]
    assert below == [lines[at].find(f"({CUT_OFF})")], "in the column of its answer"
    pieces = [piece for row in draw(marked, width, 24).rows for piece in row if piece.text == f"({CUT_OFF})"]
    assert [piece.style for piece in pieces] == ["warn"], "not in the style of a text, which may hold the same words"


def test_of_each_answer_that_begins_on_the_screen_it_is_seen_that_it_was_cut_off():
    state = at_task(*("Add water, a little flour and wait. " * 20 for _ in "abcd"))
    assert state.task is not None
    screen = shown(replace(state, task=replace(state.task, endings=(CUT_OFF,) * 4)), 100, 35)
    assert "more lines" in screen, "their ends are below"
    assert screen.count(CUT_OFF) == 4


@settings(max_examples=40, deadline=None)
@given(states(), st.integers(40, 140), st.integers(12, 45))
def test_all_of_the_answers_is_reached_by_scrolling(state, width, height):
    if state.task is None:
        return
    state = replace(state, view="rank", is_joining=False, top=0)
    laid_out = document(state.task.prompt, state.task.completions, (), width, height // 6 if height >= 20 else 0)
    for number, answer in enumerate(state.task.completions):
        text = [
            piece.text for row in laid_out.rows for cell in row if cell.completion == number for piece in cell.pieces
        ]
        expected = "".join(in_one_line(line.expandtabs(4)) for line in answer.replace("\r\n", "\n").split("\n"))
        expected = expected if answer.strip() else "(anemptyanswer)" if not answer else "(onlywhitespace)"
        assert _inked("".join(text)) == _inked(expected)
    unseen = set(range(len(laid_out.rows)))
    while unseen:
        here = scroll_area(state, width, height)
        shown_now = [piece.text for row in draw(state, width, height).rows for piece in row]
        for number in range(state.top, min(state.top + here.page, here.total)):
            assert all(piece.text in shown_now for cell in laid_out.rows[number] for piece in cell.pieces)
            unseen.discard(number)
        assert state.top < here.last or not unseen
        state, _ = step(state, Key("text", " "), here)


def _inked(text: str) -> str:
    return text.replace(" ", "").replace("\u25cc", "")


def test_a_page_down_leaves_out_no_line():
    state = at_task(*("\n".join(f"{letter}{n:03d}" for n in range(60)) for letter in "WXYZ"))
    seen = set()
    for _ in range(60):
        seen |= set(re.findall(r"[WXYZ]\d{3}", shown(state)))
        state, _ = step(state, Key("pagedown"), scroll_area(state, 80, 24))
    assert len(seen) == 240


def test_the_screen_says_how_far_one_is_what_is_asked_and_what_to_press():
    screen = shown(at_task("Add water.", "Wait an hour."))
    assert screen.splitlines()[0].startswith(" 12 of 40  ███████─")
    assert "38 s each, about 18 min left" in screen
    assert screen.splitlines()[0].endswith("Maria")
    assert " Why is my bread so heavy?" in screen
    assert "  a   Add water." in screen
    assert "  b   Wait an hour." in screen
    assert " ranking  none yet" in screen
    assert "a-b rank  = tie  Enter submit  u undo  s skip  f flag  n note  ? help  q quit" in screen


def test_the_ranking_is_shown_as_it_would_be_written_with_what_lacks():
    state = replace(at_task("w", "x", "y", "z"), tiers=((1,), (0, 2)))
    screen = shown(state)
    assert " ranking  b > a = c    to place: d" in screen
    assert re.search(r"^  1st$", screen, re.MULTILINE)
    assert screen.count("=2nd") == 2
    assert "b > a = c = _" in shown(replace(state, is_joining=True))
    assert "which answer is as good as c?" in shown(replace(state, is_joining=True))


def test_answers_stand_side_by_side_where_each_has_forty_columns():
    for count, width, columns in (
        (2, 99, 1), (2, 100, 2), (4, 80, 1), (4, 120, 2), (4, 169, 2), (4, 170, 4), (3, 127, 3), (9, 130, 3),
        (5, 173, 3),
    ):  # fmt: skip
        assert columns_for(count, width) == columns
    rows = text_of(draw(at_task("one", "two"), 100, 24))
    assert any("  a   one" in row and "│   b   two" in row for row in rows)
    long = text_of(draw(at_task("one", "two", prompt="prompt\n" * 9), 100, 24))
    assert sum("│" in row for row in long) == 2, "no line through a prompt that scrolls"


def test_more_is_seen_to_be_there_above_and_below():
    state = at_task("\n".join("abcdefghijklmnopqrstuvwxyz"), "y")
    assert "▼ 13 more lines" in shown(state)
    assert "above" not in shown(state)
    further = shown(replace(state, top=5))
    assert "── a, continued ──" in further
    assert "▲ 5 lines above" in further
    assert "more" not in shown(replace(state, top=99))


def test_a_long_prompt_scrolls_and_a_short_one_stays():
    answers = ("\n".join("x" * 40), "y")
    assert "heavy?" in shown(replace(at_task(*answers), top=20))
    long = at_task(*answers, prompt="\n".join("long" * 3))
    assert "── prompt ──" in shown(long)
    assert "heavy" not in shown(replace(long, top=20))


def test_a_conversation_is_shown_as_turns():
    turns = (Message("system", "Be brief."), Message("user", "Hello\x1b[2J\nthere"))
    screen = shown(at_task("x", "y", prompt=turns))
    assert " system:\n   Be brief.\n user:\n   Hello\\x1b[2J\n   there\n" in screen


def test_an_empty_answer_is_seen_to_be_one():
    screen = shown(at_task("", " \n "))
    assert "a   (an empty answer)" in screen
    assert "b   (only white space)" in screen


def test_marks_are_a_table_with_the_cell_that_a_digit_sets():
    state = at_task("x", "y", criteria=("helpful", "honest"), draft=Entry(((0,), (1,)), marks={"helpful": (5, None)}))
    assert " marks    1 of 4 (helpful, honest); Tab opens them" in shown(state)
    screen = shown(replace(state, view="marks", cell=(1, 0)))
    assert " marks             a    b" in screen
    assert " helpful           5   [·]" in screen
    assert "how helpful is answer b? 1 (worst) to 5 (best)" in screen


def test_the_strength_that_was_chosen_stands_out():
    state = at_task("x", "y", strengths=True, draft=Entry(((1,), (0,)), strength=2))
    chosen = [piece.text for row in draw(state, 80, 24).rows for piece in row if piece.style == "chosen"]
    assert chosen == [" 2 slightly better "]
    assert " b is" in shown(state)


@pytest.mark.parametrize("size", [(80, 24), (80, 40), (120, 40), (60, 16)])
def test_the_cursor_is_where_the_next_character_goes(size):
    for text in ("Grüße 日本", "x" * 300, ""):
        state = replace(at_task("x", "y"), view="note", line=Line.of(text))
        screen = draw(state, *size)
        assert screen.cursor is not None
        row = text_of(screen)[screen.cursor[0]]
        assert cell_len((" note".ljust(11) + text)[-0 or None :]) == screen.cursor[1] or row.endswith("x" * 20)
        assert screen.cursor[1] < size[0]


def test_trouble_is_shown_with_what_can_be_done():
    failure = Failure("cannot write labels.db: disk full", "free some space", Effect("submit"))
    screen = shown(with_failure(at_task("x", "y"), failure))
    assert "cannot write labels.db: disk full (free some space)" in screen
    assert "what you entered is still here" in screen
    assert "Enter try again  Esc back  q quit" in screen


def test_the_end_says_whether_others_are_still_at_it():
    def end(**progress):
        return shown(replace(with_task(at_task("x", "y"), None), progress=replace(PROGRESS, **progress)))

    assert "others are working on the rest (29)" in end()
    assert "Others are still working" in end(left_for_me=0)
    assert "Labeling is complete" in end(left_for_me=0, labels_left=0)


def test_a_window_too_small_says_so():
    assert "at least 40 x 12" in shown(at_task("x", "y"), 39, 24)


def test_only_rows_that_changed_are_painted_and_no_color_means_none():
    state = at_task("x", "y")
    _, rows = paint(draw(state, 80, 24), (), is_colored=True)
    again, _ = paint(draw(state, 80, 24), rows, is_colored=True)
    assert again == ""
    changed, _ = paint(draw(replace(state, tiers=((0,),)), 80, 24), rows, is_colored=True)
    assert changed.count("\x1b[2K") == 3  # place, ranking, hint
    plain, _ = paint(draw(replace(state, tiers=((0,),), hint_style="warn"), 80, 24), (), is_colored=False)
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", plain)


def test_the_last_lines_say_what_was_done_and_what_is_left():
    counts = VisitCounts(ranked=3, skipped=1, flagged=1, undone=1, active_seconds=95.0)
    outcome = Outcome("quit", counts, PROGRESS, has_draft=True, is_draft_kept=True)
    assert closing_lines(outcome, "rlhf label --run-dir R", "") == [
        "you ranked 3, skipped 1, flagged 1 and undid 1 in 1 min 35 s (19.0 s each)",
        "the open task is saved as a draft",
        "left: 29 for you",
        "to resume: rlhf label --run-dir R",
    ]
    outcome = replace(outcome, has_draft=False)
    assert closing_lines(outcome, "", "")[1:] == ["left: 29 for you"]
    held = closing_lines(replace(outcome, end="nothing left"), "", "")
    assert "others are working on these" in held[2]
    done = replace(PROGRESS, left_for_me=0, labels_left=4)
    outcome = replace(outcome, counts=VisitCounts(), progress=done)
    assert closing_lines(outcome, "", "now train") == [
        "no labels were submitted",
        "nothing is left for you; the rest is assigned to others",
    ]
    explained = replace(outcome, note="31 tasks: 30 prompts, 1 of them twice to measure your consistency")
    assert closing_lines(explained, "", "now train")[1] == explained.note
    assert explained.note not in closing_lines(replace(explained, progress=PROGRESS), "", "")
    complete = replace(outcome, progress=replace(done, is_complete=True), has_draft=True, is_draft_kept=False)
    assert closing_lines(complete, "", "now train")[1:] == [
        "your last entry could not be saved",
        "labeling is complete: now train",
    ]


def test_letters_that_do_not_follow_each_other_are_named_one_by_one():
    assert COMPLETION_LETTERS[:6] == "abcdeg"
    assert " abcdeg rank" in shown(at_task(*"uvwxyz"))


def documented() -> list[str]:
    """The screens of the documentation."""
    text = (Path(__file__).parents[3] / "docs" / "labeling-terminal.md").read_text(encoding="utf-8")
    return re.findall(r"^```\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)


def sampled(name: str) -> dict:
    samples = Path(__file__).parents[3] / "data_samples"
    return json.loads((samples / name).read_text(encoding="utf-8").splitlines()[0])


def test_the_screens_of_the_documentation_are_what_is_drawn():
    ranking, pair = sampled("rankings.jsonl"), sampled("preferences.jsonl")
    answers = [ranking["completions"][n] for n in (1, 0, 2, 3)]
    start = SessionProgress(25, 0, 0, 0, 25, False, left_for_me=25)
    state = replace(at_task(*answers, prompt=ranking["prompt"], draft=Entry(((1, 0),))), progress=start)
    assert documented()[0] == shown(replace(state, tiers=((1, 0),)))

    draft = Entry(((1,), (0,)), 3, {"helpful": (5, None), "honest": (4, None), "harmless": (3, None)})
    plan = {"criteria": ("helpful", "honest", "harmless"), "strengths": True}
    state = at_task(pair["rejected"], pair["chosen"], prompt=pair["prompt"], draft=draft, **plan)
    start = replace(start, items=21, labels_left=21, left_for_me=21)
    state = replace(state, view="marks", cell=(1, 0), progress=start)
    assert documented()[1] == shown(state, 104, 20)

    growing = SessionProgress(30, 1, 0, 1, 29, False, mine=1, left_for_me=29, pace_seconds=14.2, growth=Growth(1, 30))
    waiting = with_task(State(LabelPlan(), "Maria", growing, is_sampling=True), None, "kept; u undoes it")
    assert documented()[2] == shown(waiting, 80, 13)


@pytest.mark.parametrize(
    ("after", "says"),
    [(1, "skip; nobody else gets this task"), (2, "skip; others may still get this task")],
)
def test_the_help_says_what_a_skip_means_under_this_plan(after, says):
    rows = guide_rows(LabelPlan(set_aside_after=after), 100)
    (skip,) = [row for row in rows if row and row[0].text.strip() == "s"]
    assert "".join(piece.text for piece in skip[1:]) == says


GROWING = replace(PROGRESS, growth=Growth(12, 30))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (40, 12)])
def test_how_many_prompts_are_sampled_is_shown_above_the_prompt(width, height):
    state = replace(at_task("yes", "no"), progress=GROWING, is_sampling=True)
    assert "12 of 30 prompts sampled" not in shown(at_task("yes", "no"), width, height)
    said = "12 of 30 prompts sampled" if width >= 80 else "12 of 30"
    assert said in shown(state, width, height).splitlines()[1]
    assert "sampling stopped" in shown(replace(state, is_sampling=False), width, height) or width < 80


def test_without_a_task_the_screen_says_what_is_waited_for():
    waiting = replace(with_task(replace(at_task("yes", "no"), progress=GROWING, is_sampling=True), None), hint="")
    text = shown(waiting)
    assert "  All that is ready is labeled. The next task appears here by itself.\n" in text
    assert "  12 of 30 prompts sampled. q quits, u undoes your last label.\n" in text
    assert "Enter quit" not in text
    stopped = shown(replace(waiting, is_sampling=False))
    assert "nothing samples the other completions" in stopped
    assert "sampling stopped at 12 of 30" in stopped
    assert "Enter quits" in stopped


def test_who_leaves_while_completions_are_sampled_reads_how_far_that_is():
    lines = closing_lines(Outcome("quit", VisitCounts(1), GROWING, False, True), "", "now train")
    assert lines[-2:] == ["left: 29 for you", "12 of 30 prompts sampled"]
