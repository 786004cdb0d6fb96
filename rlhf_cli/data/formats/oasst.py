"""Conversation trees of OpenAssistant (Köpf et al. 2023, arXiv:2304.07327): sibling replies carry a `rank`, 0 the best.

Every prompter message with two or more ranked replies is a ranking; its prompt is the conversation up to that message.
Replies that were deleted or not accepted by reviewers (`review_result` false or null) are skipped with all replies
below them. Replies without a rank are missing from the ranking, but the replies below them are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rlhf_cli.data.formats.common import ImportOptions, Part, new_row, objects_of, tiers_by_rank
from rlhf_cli.data.parsing.conversations import text_of
from rlhf_cli.data.readers.rows import Row, listed, printable, shown

_ROLES = {"prompter": "user", "assistant": "assistant"}
_Message = Mapping[str, object]


def is_tree(fields: Mapping[str, object]) -> bool:
    """Whether a row is a conversation tree."""
    root = fields.get("prompt")
    return isinstance(root, dict) and "text" in root and ("replies" in root or "message_tree_id" in fields)


def is_message(fields: Mapping[str, object]) -> bool:
    """Whether a row is one message of the flat export."""
    return {"message_id", "parent_id", "text", "role"} <= fields.keys()


def convert(row: Row, options: ImportOptions) -> Iterator[Part]:
    """Yield one ranking per message with ranked replies, in the order of the tree."""
    root = row.fields["prompt"]
    assert isinstance(root, dict)
    count = 0
    if _is_accepted(root, row, options):
        # A stack, not recursion: a tree is as deep as its longest conversation.
        open_: list[tuple[str, _Message, tuple[_Message, ...]]] = [("prompt", root, ())]
        while open_:
            name, message, before = open_.pop()
            turns = (*before, _turn(row, name, message))
            replies = objects_of(row, f"{name}.replies", message.get("replies", []))
            kept = [(where, reply) for where, reply in replies if _is_accepted(reply, row, options)]
            if turns[-1]["role"] == "user" and (found := _ranking(row, message, turns, kept, options)) is not None:
                count += 1
                yield found
            open_.extend((where, reply, turns) for where, reply in reversed(kept))
    options.warnings.add("trees" if count else "trees without", row.location)


def _is_accepted(message: _Message, row: Row, options: ImportOptions) -> bool:
    if message.get("deleted") is True or message.get("review_result", True) is not True:
        options.warnings.add("replies not accepted", row.location)
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
    options: ImportOptions,
) -> Row | None:
    completions, ranks = [], []
    replies = [(name, reply) for name, reply in replies if reply.get("role") == "assistant"]
    for name, reply in replies:
        rank = reply.get("rank")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
            raise row.error(f"`{name}.rank` is {shown(rank)}; a whole number is expected, 0 the best")
        if rank is not None:
            completions.append(text_of(row, f"{name}.text", reply.get("text")))
            ranks.append(rank)
    if len(replies) > 1 and len(ranks) < len(replies):
        options.warnings.add("replies without rank", row.location, count=len(replies) - len(ranks))
    if len(completions) < 2:
        return None
    location = f" (replies to {printable(str(parent['message_id']))[:40]})" if "message_id" in parent else ""
    return new_row(row, location, {"prompt": list(turns), "completions": completions, "ranking": tiers_by_rank(ranks)})
