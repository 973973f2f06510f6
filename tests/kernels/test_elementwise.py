"""elementwise_chain: its language and what is wrong with programs, every instruction, every configuration."""

from __future__ import annotations

import pytest
import torch
from configured import assert_accurate_under, far_rows, launched
from hypothesis import given, settings
from hypothesis import strategies as st

from lrp_compiler.kernels.dialect.elementwise import ABSOLUTE_SHARES, ELEMENTWISE_CHAIN, RATIO
from lrp_compiler.kernels.launch import Config
from lrp_compiler.kernels.pointwise import OPERANDS, Instruction, ProgramError, parse

POINTWISE = [name for name in OPERANDS if name not in ("cast", "out")]
POSITIVE = ("log", "sqrt", "rsqrt")

MISTAKES = [
    ("mul 0 1\nswirl 0\nout 2 fp32", r"line 2, 'swirl 0': no instruction is called 'swirl'"),
    ("mul 0\nout 2 fp32", r"line 1, 'mul 0': mul takes 2 operand\(s\), not 1"),
    ("mul 0 7\nout 2 fp32", r"register 7 is not written yet: there are 2"),
    ("mul 0 one\nout 2 fp32", r"'one' is neither a register nor a literal"),
    ("cast 0 int4\nout 2 fp32", r"no dtype is called 'int4'"),
    ("cast 0\nout 2 fp32", r"cast takes 1 operand\(s\) and a dtype, not 1 word"),
    ("mul 0 1", r"the program gives nothing"),
    ("out 1.0 fp32", r"out takes a register"),
    ("", r"the program gives nothing"),
]


@pytest.mark.parametrize(("program", "message"), MISTAKES)
def test_what_is_wrong_with_a_program(program: str, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        ELEMENTWISE_CHAIN.supports([torch.empty(2), torch.empty(2)], program)


def test_registers_are_numbers_and_literals_have_points() -> None:
    found = parse("mul 1 -1e-3\n\n  where 2 0 inf\nout 3 bf16", 2)
    assert found == (
        Instruction("mul", (1, -1e-3)),
        Instruction("where", (2, 0, float("inf"))),
        Instruction("out", (3,), torch.bfloat16),
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", POINTWISE)
def test_every_instruction(name: str, dtype: str, device: torch.device) -> None:
    inputs = [2 * torch.randn(130, device=device) for _ in range(3)]
    inputs[0][:5] = inputs[1][:5]
    if name in POSITIVE:
        inputs[0] = inputs[0].abs() + 0.01
    places = " ".join(map(str, range(OPERANDS[name])))
    assert_accurate_under(ELEMENTWISE_CHAIN, None, (inputs, f"{name} {places}\nout 3 {dtype}"))


@pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("name", POINTWISE)
def test_nan_and_infinity_go_where_torch_sends_them(name: str, device: torch.device) -> None:
    special = torch.tensor([0.0, -0.0, 1.0, -2.0, float("inf"), -float("inf"), float("nan")], device=device)
    inputs = [special[:, None, None], special[:, None], special][: max(OPERANDS[name], 2)]
    places = " ".join(map(str, range(OPERANDS[name])))
    program = f"{name} {places}\nout {len(inputs)} fp32"
    (found,) = launched(ELEMENTWISE_CHAIN, None, (inputs, program))
    (wanted,) = ELEMENTWISE_CHAIN.reference(inputs, program)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("chosen", ELEMENTWISE_CHAIN.configs, ids=str)
@pytest.mark.parametrize("width", [900, 33])
def test_every_configuration(chosen: Config, width: int, device: torch.device) -> None:
    inputs = [torch.randn(6, width, device=device), torch.randn(width, device=device), torch.randn(6, 1, device=device)]
    assert_accurate_under(ELEMENTWISE_CHAIN, chosen, (inputs, ABSOLUTE_SHARES.format(dtype="fp32")))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_casts_round_and_masks_are_zero_or_one(device: torch.device) -> None:
    x = torch.tensor([1 + 2**-9, 0.3, 0.0, -70000.0], device=device)
    program = "cast 0 bf16\ncast 0 fp16\ncast 0 bool\nadd 3 3\nout 1 fp32\nout 2 fp32\nout 4 fp32\nout 0 bool"
    found = launched(ELEMENTWISE_CHAIN, None, ([x], program))
    wanted = [x.bfloat16().float(), x.half().float(), 2.0 * (x != 0), x != 0]
    assert all(map(torch.equal, found, wanted))


def test_results_are_new_tensors(device: torch.device) -> None:
    x = torch.randn(5, device=device)
    for made in (launched(ELEMENTWISE_CHAIN, None, ([x], "out 0 fp32\nout 0 fp32")),
                 ELEMENTWISE_CHAIN.reference([x], "out 0 fp32\nout 0 fp32")):  # fmt: skip
        assert len({x.data_ptr(), *(one.data_ptr() for one in made)}) == 3
        assert torch.equal(made[0], x) and torch.equal(made[1], x)


def test_float64_is_computed_by_the_reference(device: torch.device) -> None:
    x = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    assert not ELEMENTWISE_CHAIN.supports([x, x], RATIO.format(dtype="fp64"))
    gate = "sigmoid 0\nmul 0 1\nout 2 fp64"
    assert torch.autograd.gradcheck(lambda one: ELEMENTWISE_CHAIN.reference([one], gate)[0], (x,))


def test_rows_far_apart(device: torch.device) -> None:
    keep = torch.rand(3, 40, device=device) > 0.5
    c = torch.randn(3, 40, device=device)
    program = "where 1 0 0.0\nout 2 fp32"
    near = launched(ELEMENTWISE_CHAIN, None, ([c, keep], program))
    assert torch.equal(near[0], launched(ELEMENTWISE_CHAIN, None, ([c, far_rows(keep)], program))[0])


@st.composite
def programs(draw: st.DrawFn) -> str:
    """Some instructions on whatever registers there are, two of them results."""
    lines, registers = [], 3
    for _ in range(draw(st.integers(1, 6))):
        name = draw(st.sampled_from(["add", "sub", "mul", "maximum", "where", "gt", "logical_and", "neg", "abs"]))
        tokens = [draw(st.sampled_from([*map(str, range(registers)), "0.5"])) for _ in range(OPERANDS[name])]
        lines.append(" ".join([name, *tokens]))
        registers += 1
    return "\n".join([*lines, f"out {registers - 1} fp32", f"out {draw(st.integers(0, registers - 1))} bool"])


@settings(max_examples=20, deadline=None)
@given(programs(), st.integers(0, 2**31))
def test_programs_give_what_torch_gives(program: str, seed: int) -> None:
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = [torch.randn(3, 1, device=device), torch.randn(5, device=device), torch.rand(3, 5, device=device) > 0.5]
    found = launched(ELEMENTWISE_CHAIN, None, (inputs, program))
    wanted = ELEMENTWISE_CHAIN.reference(inputs, program)
    assert torch.allclose(found[0], wanted[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], wanted[1])
