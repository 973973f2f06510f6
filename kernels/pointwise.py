"""The language of pointwise programs: its instructions, its parser, and what each instruction is in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "bool": torch.bool,
}
"""Names of dtypes in programs."""

NUMBERS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "reciprocal": torch.reciprocal,
    "abs": torch.abs,
    "sign": torch.sign,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "relu": torch.relu,
    "clamp_min": torch.maximum,
    "clamp_max": torch.minimum,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "threshold_backward": lambda c, x, threshold: torch.where(x <= threshold, 0.0, c),
    "gt": torch.gt,
    "ge": torch.ge,
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
}
"""Instruction on numbers -> what it computes; the last six give masks."""

MASKS: dict[str, Callable[..., Tensor]] = {
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_not": torch.logical_not,
}
"""Instruction on masks -> what it computes."""

OPERANDS: dict[str, int] = {
    **dict.fromkeys(NUMBERS, 2),
    **dict.fromkeys(("neg", "reciprocal", "abs", "sign", "exp", "log", "sqrt", "rsqrt"), 1),
    **dict.fromkeys(("tanh", "sigmoid", "silu", "erf", "erfc", "relu"), 1),
    **dict.fromkeys(MASKS, 2),
    "threshold_backward": 3,
    "logical_not": 1,
    "where": 3,
    "cast": 1,
    "out": 1,
}
"""Instruction -> how many operands it takes."""


class ProgramError(ValueError):
    """A pointwise program that cannot be read: which line, what stands there, and what is wrong with it."""


@dataclass(frozen=True)
class Instruction:
    """``operands`` are numbers of registers (int) or literals (float); ``dtype`` that of a cast or a result."""

    name: str
    operands: tuple[int | float, ...]
    dtype: torch.dtype | None = None


@cache
def parse(program: str, inputs: int) -> tuple[Instruction, ...]:
    """The instructions of a program over so many inputs; raises ProgramError with the line.

    Registers 0 to ``inputs`` - 1 are the inputs; every instruction but ``out`` writes the next register. One
    instruction per line: its name, then its operands, a register's number (``3``) or a literal, which has a point, an
    exponent or is inf or nan (``3.0``). ``cast 3 bf16`` rounds through a dtype, ``out 3 bf16`` makes a result of one.
    """
    made: list[Instruction] = []
    registers = inputs
    for number, line in enumerate(program.splitlines(), 1):
        if not line.split():
            continue
        try:
            made.append(_instruction(line.split(), registers))
        except ProgramError as cause:
            raise ProgramError(f"line {number}, {line.strip()!r}: {cause}") from None
        registers += made[-1].name != "out"
    if not any(one.name == "out" for one in made):
        raise ProgramError("the program gives nothing: it has no line 'out REGISTER DTYPE'")
    return tuple(made)


def _instruction(words: list[str], registers: int) -> Instruction:
    name, *rest = words
    if name not in OPERANDS:
        raise ProgramError(f"no instruction is called {name!r} (known: {', '.join(OPERANDS)})")
    typed = name in ("cast", "out")
    if len(rest) != OPERANDS[name] + typed:
        raise ProgramError(f"{name} takes {OPERANDS[name]} operand(s){' and a dtype' * typed}, not {len(rest)} word(s)")
    if typed and rest[-1] not in DTYPES:
        raise ProgramError(f"no dtype is called {rest[-1]!r} (known: {', '.join(DTYPES)})")
    operands = tuple(_operand(word, registers) for word in rest[: OPERANDS[name]])
    if name == "out" and not isinstance(operands[0], int):
        raise ProgramError("out takes a register")
    return Instruction(name, operands, DTYPES[rest[-1]] if typed else None)


def _operand(word: str, registers: int) -> int | float:
    if word.isdecimal():
        if int(word) >= registers:
            raise ProgramError(f"register {word} is not written yet: there are {registers} (literals have a point)")
        return int(word)
    try:
        return float(word)
    except ValueError:
        raise ProgramError(f"{word!r} is neither a register nor a literal") from None


def joint_shape(inputs: Sequence[Tensor]) -> torch.Size:
    """The shape that the inputs broadcast to."""
    shape: torch.Size = torch.broadcast_shapes(*(one.shape for one in inputs))  # type: ignore[no-untyped-call]
    return shape


def run(instructions: tuple[Instruction, ...], inputs: list[Tensor]) -> list[Tensor]:
    """The results in torch ops, of the shape that the inputs broadcast to, contiguous and new.

    Registers are float32, float64 if an input is, or masks: bool inputs and what comparisons give. A mask counts as 0
    or 1 where a number is wanted, a number as whether it is not 0 where a mask is.
    """
    wide = torch.float64 if any(one.dtype == torch.float64 for one in inputs) else torch.float32
    shape = joint_shape(inputs)
    registers = [one if one.dtype == torch.bool else one.to(wide) for one in inputs]
    results = []
    for one in instructions:
        found = [
            registers[operand] if isinstance(operand, int) else inputs[0].new_full((), operand, dtype=wide)
            for operand in one.operands
        ]
        made = _evaluate(one, found, wide)
        if one.name == "out":
            results.append(made.expand(shape).clone(memory_format=torch.contiguous_format))
        else:
            registers.append(made)
    return results


def _evaluate(one: Instruction, operands: list[Tensor], wide: torch.dtype) -> Tensor:
    if one.dtype is not None:
        narrow = as_mask(operands[0]) if one.dtype == torch.bool else operands[0].to(one.dtype)
        return narrow if one.name == "out" or one.dtype == torch.bool else narrow.to(wide)
    if one.name in MASKS:
        return MASKS[one.name](*map(as_mask, operands))
    if one.name == "where":
        return torch.where(as_mask(operands[0]), operands[1].to(wide), operands[2].to(wide))
    return NUMBERS[one.name](*(operand.to(wide) for operand in operands))


def as_mask(value: Tensor) -> Tensor:
    """Where ``value`` is not zero."""
    return value if value.dtype == torch.bool else value != 0
