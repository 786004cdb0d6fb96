"""Conversation trees of OpenAssistant (Köpf et al. 2023, arXiv:2304.07327): sibling replies carry a `rank`, 0 the best.

Every prompter's message with two or more ranked replies is a ranking; its prompt is the conversation to there. Replies
that were deleted, or that reviewers did not accept (`review_result` false or null), are left out with all below them;
replies without a rank are left out of the ranking, and what follows them is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_cli.data.conversations import text_of
from rlhf_cli.data.formats.common import Part, Wanted, each, part, tiers_by_rank
from rlhf_cli.data.rows import Row, listed, printable, shown

_ROLES = {"prompter": "user", "assistant": "assistant"}
_Message = Mapping[str, object]


def is_tree(fields: Mapping[str, object]) -> bool:
    """Whether a row is a tree."""
    root = fields.get("prompt")
    return isinstance(root, dict) and "text" in root and ("replies" in root or "message_tree_id" in fields)


def is_message(fields: Mapping[str, object]) -> bool:
    """Whether a row is a message of the flat export."""
    return {"message_id", "parent_id", "text", "role"} <= fields.keys()


def parts(row: Row, wanted: Wanted) -> Iterator[Part]:
    """A ranking for each message whose replies were ranked, in the order of the tree."""
    root = row.fields["prompt"]
    assert isinstance(root, dict)
    count = 0
    if _is_accepted(root, row, wanted):
        # A list, not recursion: trees are as deep as people talked.
        open_: list[tuple[str, _Message, tuple[_Message, ...]]] = [("prompt", root, ())]
        while open_:
            name, message, before = open_.pop()
            turns = (*before, _turn(row, name, message))
            replies = each(row, f"{name}.replies", message.get("replies", []))
            kept = [(where, reply) for where, reply in replies if _is_accepted(reply, row, wanted)]
            if turns[-1]["role"] == "user" and (found := _ranking(row, message, turns, kept, wanted)) is not None:
                count += 1
                yield found
            open_.extend((where, reply, turns) for where, reply in reversed(kept))
    wanted.remarks.add("trees" if count else "trees without", row.place)


def _is_accepted(message: _Message, row: Row, wanted: Wanted) -> bool:
    if message.get("deleted") is True or message.get("review_result", True) is not True:
        wanted.remarks.add("replies not accepted", row.place)
        return False
    return True


def _turn(row: Row, name: str, message: _Message) -> dict[str, object]:
    for field in ("role", "text"):
        if field not in message:
            raise row.error(f"`{name}` has no `{field}`: it has {listed(message)}")
    role = message["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise row.error(f"`{name}.role` is {shown(role)}; roles are {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": text_of(row, f"{name}.text", message["text"])}


def _ranking(
    row: Row,
    parent: _Message,
    turns: tuple[_Message, ...],
    replies: list[tuple[str, dict[str, object]]],
    wanted: Wanted,
) -> Row | None:
    answers, ranks = [], []
    replies = [(name, reply) for name, reply in replies if reply.get("role") == "assistant"]
    for name, reply in replies:
        rank = reply.get("rank")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
            raise row.error(f"`{name}.rank` is {shown(rank)}; a whole number is expected, 0 the best")
        if rank is not None:
            answers.append(text_of(row, f"{name}.text", reply.get("text")))
            ranks.append(rank)
    if len(replies) > 1 and len(ranks) < len(replies):
        wanted.remarks.add("replies without rank", row.place, count=len(replies) - len(ranks))
    if len(answers) < 2:
        return None
    place = f" (replies to {printable(str(parent['message_id']))[:40]})" if "message_id" in parent else ""
    return part(row, place, {"prompt": list(turns), "completions": answers, "ranking": tiers_by_rank(ranks)})
