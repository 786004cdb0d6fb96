"""What each key does, without a terminal and without a store."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.labeling.session.plan import LabelPlan
from rlhf_cli.labeling.session.types import COMPLETION_LETTERS, Entry, LabelTask
from rlhf_cli.labeling.terminal.key_bindings import step
from rlhf_cli.labeling.terminal.keys import Key
from rlhf_cli.labeling.terminal.state import Effect, Failure, ScrollArea, State, with_failure, with_task

EXTENT = ScrollArea(page=10, total=40, stops=(0, 12, 25, 33), of_completion=(0, 1, 2, 3))
NAMED = {
    "\r": "enter", "\b": "backspace", "\t": "tab", "\x1b": "escape", "<": "left", ">": "right", "^": "up", "v": "down",
    "{": "pageup", "}": "pagedown", "[": "home", "]": "end", "X": "delete",
}  # fmt: skip


def begun(count: int = 4, draft: Entry | None = None, **plan) -> State:
    task = LabelTask(7, 1, "What?", tuple(f"answer {n}" for n in range(count)), LabelPlan().display_hash, draft)
    return with_task(State(LabelPlan(**plan)), task)


def keys(text: str) -> list[Key]:
    return [Key("control", "u") if c == "\x15" else Key(NAMED[c]) if c in NAMED else Key("text", c) for c in text]


def press(state: State, text: str) -> tuple[State, list[Effect]]:
    effects = []
    for key in keys(text):
        state, effect = step(state, key, EXTENT)
        effects += [effect] if effect is not None else []
    return state, effects


@pytest.mark.parametrize(
    ("text", "tiers"),
    [
        pytest.param("bacd", ((1,), (0,), (2,), (3,)), id="best to worst"),
        pytest.param("b=acd", ((1, 0), (2,), (3,)), id="a tie"),
        pytest.param("b=a=d=c", ((1, 0, 3, 2),), id="all tied"),
        pytest.param("b==ac", ((1, 0), (2,)), id="= twice is = once"),
        pytest.param("BA", ((1,), (0,)), id="Caps Lock"),
        pytest.param("=b", ((1,),), id="= before anything"),
        pytest.param("ba\b", ((1,),), id="Backspace takes the last back"),
        pytest.param("b=a\b", ((1,),), id="also out of a tie"),
        pytest.param("b=\ba", ((1,), (0,)), id="also a waiting ="),
        pytest.param("b\b\b", (), id="nothing left to take back"),
        pytest.param("bb", ((1,),), id="a key that bounces"),
        pytest.param("b=aa", ((1, 0),), id="a key that bounces in a tie"),
        pytest.param("bacda", ((1,), (2,), (3,), (0,)), id="pressed again: to the end"),
        pytest.param("bacd=b", ((0,), (2,), (3, 1)), id="pressed again after =: to the last place"),
        pytest.param("b=ac=b", ((0,), (2, 1)), id="from one tie to another"),
        pytest.param("bacd\x15d", ((3,),), id="started over"),
        pytest.param("behijz5~é", ((1,),), id="letters of no answer"),
    ],
)
def test_letters_make_a_ranking(text, tiers):
    state, effects = press(begun(), text)
    assert (state.tiers, effects) == (tiers, [])


@st.composite
def rankings(draw, count: int):
    order = draw(st.permutations(range(count)))
    ties = draw(st.lists(st.booleans(), min_size=count - 1, max_size=count - 1))
    tiers = [[order[0]]]
    for answer, is_tie in zip(order[1:], ties, strict=True):
        tiers[-1].append(answer) if is_tie else tiers.append([answer])
    return tuple(tuple(tier) for tier in tiers)


@given(
    st.integers(2, 9).flatmap(lambda n: st.tuples(st.just(n), rankings(n), st.text("abcdeghij=\b\x15<>", max_size=20)))
)
def test_a_whole_ranking_typed_gives_that_ranking_whatever_was_there_before(given_):
    count, tiers, before = given_
    text = "".join("=".join(COMPLETION_LETTERS[answer] for answer in tier) for tier in tiers)
    state, _ = press(begun(count), before)
    state, effects = press(state, text + "\r")
    assert effects == [Effect("submit", Entry(tuple(tuple(sorted(tier)) for tier in tiers)))]
    assert state.unplaced == ()


@given(st.text("abcdefnsuq=?\b\r\t\x1b<>^v{}[]X 123456é", max_size=60), st.booleans(), st.integers(2, 4))
def test_no_keys_make_an_entry_that_no_label_could_begin_with(text, has_criteria, count):
    state = begun(count, criteria=("helpful", "honest") if has_criteria else (), strengths=True)
    for key in keys(text):
        state, effect = step(state, key, EXTENT)
        placed = [position for tier in state.tiers for position in tier]
        assert sorted(set(placed)) == sorted(placed)
        assert all(state.tiers)
        assert set(placed) <= set(range(count))
        assert state.strength is None or state.asks_strength
        assert 0 <= state.top <= EXTENT.last
        if effect is not None and effect.kind == "submit":
            state.plan.check(effect.entry, count)
        if effect is not None and effect.kind in ("quit", "skip", "flag", "undo"):
            assert key.name in ("text", "enter")


def test_enter_says_what_lacks_and_submits_what_is_whole():
    state, effects = press(begun(), "ba\r")
    assert effects == []
    assert "answers c, d have no place yet" in state.hint
    state, effects = press(state, "cd=\r")
    assert effects == []
    assert "needs a second letter" in state.hint
    state, effects = press(state, "\b\r")
    assert effects == [Effect("submit", Entry(((1,), (0,), (2,), (3,))))]


def test_unknown_keys_and_pastes_change_nothing_and_say_so():
    state, _ = press(begun(), "ba")
    for key in (*keys("zx7\x1b"), Key("unknown"), Key("paste", "c=d\rq"), Key("control", "s"), Key("text", "\ufffdc")):
        after, effect = step(state, key, EXTENT)
        assert effect is None
        assert after.hint
        assert replace(after, hint="") == replace(state, hint="")


def test_commands_ask_the_session():
    assert [effect.kind for effect in press(begun(), "usq")[1]] == ["undo", "skip", "quit"]
    for letter, kind in (("c", "quit"), ("z", "suspend"), ("l", "redraw")):
        for view in ("rank", "note", "help"):
            assert step(replace(begun(), view=view), Key("control", letter), EXTENT)[1] == Effect(kind)


def test_how_much_better_is_asked_of_two_answers_and_not_of_a_tie():
    state, effects = press(begun(2, strengths=True), "3ab\r5")
    assert (state.strength, effects) == (None, [])
    state, effects = press(state, "32\r")
    assert effects == [Effect("submit", Entry(((0,), (1,)), strength=2))]
    assert press(state, "a")[0].strength is None, "another ranking: another strength"
    assert press(begun(2, strengths=True), "a=b3\r")[1] == [Effect("submit", Entry(((0, 1),)))]
    assert press(begun(3, strengths=True), "abc3\r")[1] == [Effect("submit", Entry(((0,), (1,), (2,))))]


def test_marks_come_after_the_ranking_answer_by_answer():
    state, effects = press(begun(2, criteria=("helpful", "honest")), "1ab4153\r")
    marks = {"helpful": (4, 5), "honest": (1, 3)}
    assert effects == [Effect("submit", Entry(((0,), (1,)), marks=marks))]
    assert press(state, "\b\r")[1] == [], "a mark was taken back"


def test_enter_leads_to_the_first_mark_that_lacks():
    state, _ = press(begun(2, criteria=("helpful", "honest")), "ab\t4\t5\x1b\r")
    assert (state.view, state.cell) == ("marks", (0, 1))
    assert "honest" in state.hint


def test_cells_are_reached_by_arrows_letters_and_tab():
    state, _ = press(begun(3, criteria=("helpful", "honest")), "abc\t")
    for text, cell in (("v", (0, 1)), ("v", (0, 1)), (">", (1, 1)), ("c", (2, 0)), ("\t\t\t", (2, 1)), ("<^", (1, 0))):
        state, _ = press(state, text)
        assert state.cell == cell
    state, _ = press(state, "5\b")
    assert (state.marks, state.cell) == (((None, None), (None, None), (None, None)), (1, 0))
    assert press(state, "069=")[0].marks == state.marks
    assert press(state, "\x1b=a")[0].tiers == ((1,), (2, 0)), "back at the ranking"


def test_strength_then_marks():
    _, effects = press(begun(2, criteria=("helpful",), strengths=True), "ba354\r")
    assert effects == [Effect("submit", Entry(((1,), (0,)), strength=3, marks={"helpful": (5, 4)}))]


def test_a_note_is_typed_kept_changed_or_left():
    state, _ = press(begun(), "bnsquf?=1")
    assert state.entry == Entry(((1,),), note="squf?=1"), "kept as it is typed, and no command in it"
    state, _ = press(state, "\x1b")
    assert state.entry == Entry(((1,),)), "left"
    state, _ = press(state, "nok\rn!\r")
    assert (state.note, state.view, state.tiers) == ("ok!", "rank", ((1,),))


def test_a_flag_needs_a_reason():
    state, effects = press(begun(), "f \r")
    assert (state.view, effects) == ("flag", [])
    state, effects = press(state, "bad \r")
    assert effects == [Effect("flag", reason="bad")]
    assert press(begun(), "fbad\x1b")[1] == []


def test_no_more_than_the_limit_goes_into_a_note():
    state, _ = press(begun(), "n")
    state, _ = step(state, Key("paste", "x" * 20_000), EXTENT)
    assert len(state.line.text) == 10_000
    assert "10,000" in state.hint


def test_a_draft_comes_back_and_marks_out_of_range_do_not():
    draft = Entry(((1,), (0,)), 2, {"helpful": (5, 9), "gone": (1, 1)}, "hm")
    state = begun(2, draft, criteria=("helpful", "honest"), strengths=True)
    assert state.entry == Entry(((1,), (0,)), 2, {"helpful": (5, None), "honest": (None, None)}, "hm")
    assert begun(2, draft).strength is None, "no longer asked"


@pytest.mark.parametrize(
    ("text", "top"),
    [("v", 1), ("^", 0), ("}", 8), (" ", 8), ("]", 30), ("]^", 29), ("]v}", 30), ("]{", 22), ("][", 0), (">", 12),
     (">>", 25), (">>>>", 30), (">><", 12), ("v<", 0)],
)  # fmt: skip
def test_scrolling_stays_within_what_is_there(text, top):
    assert press(begun(), text)[0].top == top


def test_help_scrolls_by_itself_and_returns():
    state, effects = press(begun(), "v?}b=s")
    assert (state.view, state.help_top, state.top, state.tiers, effects) == ("help", 8, 1, (), [])
    assert press(state, "q")[0].view == press(state, "?")[0].view == press(state, "\r")[0].view == "rank"


def test_trouble_is_tried_again_left_or_ended():
    state, _ = press(begun(), "bacd")
    submit = Effect("submit", state.entry)
    troubled = with_failure(state, Failure("disk full", "", submit))
    assert press(troubled, "bsu") == (troubled, [])
    assert press(troubled, "\r")[1] == [submit]
    assert press(troubled, "\x1b")[0].tiers == state.tiers
    assert press(troubled, "q")[1] == [Effect("quit")]
    again = with_failure(troubled, Failure("disk full", "", Effect("quit")))
    assert press(again, "q")[1] == [Effect("leave")]
    assert again.before == "rank"


def test_at_the_end_one_can_still_go_back():
    state = with_task(begun(), None)
    assert [effect.kind for effect in press(state, "abcsfn\t5u\r")[1]] == ["undo", "quit"]
