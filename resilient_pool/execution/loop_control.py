"""Reads bytecode: whether a loop is certain to go on after a block in it has ended."""

from __future__ import annotations

import bisect
import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType

# After the block nothing may happen but this. Python's names differ between its versions; one that is not listed here
# makes the answer uncertain, never wrong.
_IDLE = frozenset({"NOP", "CACHE", "EXTENDED_ARG", "NOT_TAKEN", "END_SEND", "POP_TOP", "TO_BOOL"})
_JUMPS = frozenset({"JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE"})
_IF_SWALLOWED = frozenset({"POP_JUMP_FORWARD_IF_TRUE", "POP_JUMP_IF_TRUE"})
_ENDS = frozenset({"RETURN_VALUE", "RETURN_CONST", "RERAISE", "RAISE_VARARGS"})


@dataclass(frozen=True, slots=True, kw_only=True)
class FramePosition:
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
    def of(cls, frame: FrameType) -> FramePosition:
        """Return where `frame` stands now."""
        return cls(frame=id(frame), code=frame.f_code, offset=frame.f_lasti)

    @property
    def is_loop_head(self) -> bool:
        """Whether an `async for` asks here for its next item."""
        step = _step_at(_steps(self.code), self.offset)
        return step is not None and step.opname == "GET_ANEXT"

    def leads_to(self, head: FramePosition, *, swallowing: bool) -> bool:
        """Whether the end of an `async with` block, awaited here, is certain to be followed by the next item of a loop.

        That is so if nothing but jumps stands between. The compiler gives every way out of a block (its end,
        `continue`, `break`, `return`) an await of its own, so the place of the await shows which way it is. A generator
        that yields inside the loop is an exception: what it has yielded cannot be taken back.

        Args:
            head: Where the loop asks.
            swallowing: Whether the block ended in an exception, which `__aexit__` is going to swallow.
        """
        if head.frame != self.frame or head.code is not self.code or not head.is_loop_head:
            return False
        return leads_to(self.code, self.offset, head.offset, swallowing=swallowing) and not yields_within(
            self.code, head.offset
        )


def leads_to(code: CodeType, await_offset: int, goal: int, *, swallowing: bool) -> bool:
    """Whether after the await at one offset nothing happens before the instruction at another.

    Args:
        code: Both are in it.
        await_offset: Where the await stands.
        goal: What must come next.
        swallowing: Whether the awaited value is true, so that an exception is swallowed.
    """
    steps = _steps(code)
    step = _step_at(steps, await_offset)
    if step is None or step.opname != "SEND":
        return False
    following = _following(steps)
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


def yields_within(code: CodeType, head: int) -> bool:
    """Whether a generator may yield between the moment its loop gets an item at `head` and the one it asks for the next.

    Every path is followed, also through handlers of exceptions; the way on when the items are used up is not.
    """
    if not code.co_flags & inspect.CO_ASYNC_GENERATOR:
        return False
    steps = _steps(code)
    following = _following(steps)
    before = {after: steps[offset].opname for offset, after in following.items()}
    handlers = dis.Bytecode(code).exception_entries  # type: ignore[attr-defined] # typeshed does not know it
    ahead, seen = [following[head]], {head}
    while ahead:
        at = ahead.pop()
        if at in seen:
            continue
        seen.add(at)
        step = steps[at]
        if step.opname == "YIELD_VALUE" and before.get(at) != "SEND":  # an await is SEND, then YIELD_VALUE
            return True
        caught = (entry.target for entry in handlers if entry.start <= at < entry.end)
        ahead += [target for target in caught if steps[target].opname != "END_ASYNC_FOR"]
        ahead += _successors(step, following)
    return False


def _successors(step: dis.Instruction, following: dict[int, int]) -> Iterator[int]:
    if step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
        yield step.argval
    if step.opname not in _JUMPS | _ENDS and step.offset in following:
        yield following[step.offset]


def _steps(code: CodeType) -> dict[int, dis.Instruction]:
    return {step.offset: step for step in dis.get_instructions(code)}


def _following(steps: dict[int, dis.Instruction]) -> dict[int, int]:
    return dict(zip(steps, list(steps)[1:], strict=False))


def _step_at(steps: dict[int, dis.Instruction], offset: int) -> dis.Instruction | None:
    """Return the instruction at an offset, or the one whose inline cache is there: in 3.12 a frame that awaits stands in it."""
    offsets = list(steps)
    at = bisect.bisect_right(offsets, offset) - 1
    step = steps[offsets[at]] if at >= 0 else None
    is_last = at + 1 == len(offsets)
    return None if step is None or (is_last and offset > offsets[at]) else step
