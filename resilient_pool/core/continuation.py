"""The only module that reads bytecode: whether a loop is certain to go on after a block in it has ended."""

from __future__ import annotations

import dis
from dataclasses import dataclass
from types import CodeType, FrameType

# After the block nothing may happen but this. Python's names differ between its versions; one that is not listed here
# makes the answer uncertain, never wrong.
_IDLE = frozenset({"NOP", "CACHE", "EXTENDED_ARG", "NOT_TAKEN", "END_SEND", "POP_TOP", "TO_BOOL"})
_JUMPS = frozenset({"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"})
_IF_SWALLOWED = frozenset({"POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_IF_TRUE"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A place in a running frame.

    Attributes:
        frame: The frame's identity. It is not kept alive.
        code: What it runs.
        offset: Where in it the frame stood.
    """

    frame: int
    code: CodeType
    offset: int

    @classmethod
    def of(cls, frame: FrameType) -> Place:
        """Return where `frame` stands now."""
        return cls(frame=id(frame), code=frame.f_code, offset=frame.f_lasti)

    @property
    def is_loop_head(self) -> bool:
        """Whether an `async for` asks here for its next item."""
        return any(
            step.offset == self.offset and step.opname == "GET_ANEXT" for step in dis.get_instructions(self.code)
        )

    def leads_to(self, head: Place, *, swallowing: bool) -> bool:
        """Whether the end of an `async with` block, awaited here, is certain to be followed by the next item of a loop.

        That is so if nothing but jumps stands between. The compiler gives every way out of a block (its end,
        `continue`, `break`, `return`) an await of its own, so the place of the await tells which way it is.

        Args:
            head: Where the loop asks.
            swallowing: Whether the block ended in an exception, which `__aexit__` is going to swallow.
        """
        if head.frame != self.frame or head.code is not self.code or not head.is_loop_head:
            return False
        return leads_to(self.code, self.offset, head.offset, swallowing=swallowing)


def leads_to(code: CodeType, await_offset: int, goal: int, *, swallowing: bool) -> bool:
    """Whether after the await at one offset nothing happens before the instruction at another.

    Args:
        code: Both are in it.
        await_offset: Where the await stands.
        goal: What must come next.
        swallowing: Whether the value awaited tells to swallow an exception, and does.
    """
    steps = {step.offset: step for step in dis.get_instructions(code)}
    following = dict(zip(steps, list(steps)[1:], strict=False))
    step = steps.get(await_offset)
    if step is None or step.opname != "SEND":
        return False
    idle = _IDLE | {"POP_EXCEPT"} if swallowing else _IDLE
    at: int | None = step.argval
    for _ in steps:  # a path longer than that goes in circles
        if at == goal:
            return True
        step = None if at is None else steps.get(at)
        if step is None:
            return False
        if step.opname in idle:
            at = following.get(step.offset)
        elif step.opname in _JUMPS or (swallowing and step.opname in _IF_SWALLOWED):
            at = step.argval
        else:
            return False
    return False
