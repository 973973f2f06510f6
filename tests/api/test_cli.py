"""The command line, in a process of its own and inside this one: what it prints, writes and exits with."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from importlib import metadata
from pathlib import Path

import pytest

from lrp_compiler.cli import main

ROOT = Path(__file__).resolve().parents[2]

FACTORIES = """
import collections

import torch
from torch import nn


def covered():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.ones(2, 3),)


class Hole(nn.Module):
    def forward(self, x, scale):
        return torch.special.i1e(x.relu()) * scale


class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x * 2
        return x


class Broken(nn.Module):
    def forward(self, x):
        raise KeyError("the model's own")


class Build:
    @staticmethod
    def small():
        return covered()


def uncovered():
    return Hole(), (torch.ones(2, 3),), {"scale": torch.ones(3)}


def branching():
    return Branch(), [torch.ones(2, 3)]


def broken():
    return Broken(), (torch.ones(2),)


def as_object():
    return collections.namedtuple("Case", "model args kwargs")(*uncovered()[:2], {"scale": torch.ones(3)})


class Case:
    model, args = covered()


def as_attributes():
    return Case()


def no_tuple():
    return covered()[0], torch.ones(2, 3)


def no_model():
    return torch.relu, (torch.ones(2, 3),)


def alone():
    return covered()[0]


def list_of_names():
    return covered()[0], (), ["x"]


def failing():
    raise ValueError("the factory's own")


number = 3
"""


@pytest.fixture
def module(tmp_path: Path) -> str:
    """A module of factories in ``tmp_path``, under a name of its own since imported modules stay imported."""
    name = f"factories_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(FACTORIES, encoding="utf-8")
    return name


def in_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lrp_compiler", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_covered_model_in_a_process_of_its_own(module: str, tmp_path: Path) -> None:
    done = in_process("coverage", f"{module}:covered", "--json", "out.json", "--nodes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Sequential: epsilon (")
    assert lines[1] == "  live nodes covered 3/3 (100 %), by kind of op 2/2 (100 %)"
    relu = ["aten::relu", "activation", *"111", "identity", "coefficient", "output", "x", "1"]
    assert relu in [line.split() for line in lines]
    assert any(line.startswith("relu ") and "coefficient to linear" in line for line in lines)
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert data["complete"] and data["live_nodes"] == data["covered_nodes"] == 3
    assert [node["name"] for node in data["nodes"]] == ["linear", "relu", "linear_1"]
    assert {"capture", "assign_rules", "codegen"} <= set(data["milliseconds"])


def test_uncovered_ops_are_listed_with_their_line(module: str, tmp_path: Path) -> None:
    done = in_process("coverage", f"{module}:uncovered", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "live nodes covered 2/3 (66 %)" in done.stdout
    line = "return torch.special.i1e(x.relu()) * scale"
    assert f"aten::special_i1e (not in the op table) as special_i1e in (the model itself): {tmp_path}" in done.stdout
    assert line in done.stdout


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["coverage", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize(("factory", "code"), [("as_object", 1), ("as_attributes", 0), ("Build.small", 0)])
def test_factories_return_what_they_like(
    factory: str, code: int, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, f"{module}:{factory}", "--path", str(tmp_path))[0] == code


def test_composite_and_attributed_inputs(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--path", str(tmp_path))
    code, out, _ = run(capsys, f"{module}:uncovered", "--wrt", "scale", *where)
    assert code == 0 and "aten::special_i1e              1      0     0" in out
    code, out, _ = run(capsys, f"{module}:covered", "--composite", "gradient", *where)
    assert code == 0 and out.startswith("Sequential: gradient\n")


def test_a_call_that_cannot_be_captured_is_a_row(
    module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, f"{module}:branching", "--path", str(tmp_path), "--json", str(tmp_path / "out.json"))
    assert code == 1 and not err
    assert "not compiled: [LRP" in out and "if x.sum() > 0:" in out and "remedy: " in out
    (failure,) = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["failures"]
    assert failure["id"].startswith("LRP") and "torch.cond" in failure["remedy"] and f"{module}.py" in failure["source"]


MISTAKES = [
    ("{module}", [], "is not of the form module:factory"),
    ("no_such_module_at_all:f", [], "there is no module 'no_such_module_at_all'"),
    ("{module}:nothing", [], "there is no 'nothing' in"),
    ("{module}:number", [], "an object of type int, not a function"),
    ("{module}:no_tuple", [], "args is an object of type Tensor"),
    ("{module}:no_model", [], "the model is an object of type builtin_function_or_method"),
    ("{module}:alone", [], "it returned an object of type Sequential"),
    ("{module}:list_of_names", [], "kwargs is list of 1: (str)"),
    ("{module}:covered", ["--composite", "lrp"], "unknown composite 'lrp'"),
    ("{module}:covered", ["--wrt", "image"], "there is no input named 'image'"),
]


@pytest.mark.parametrize(("spec", "options", "message"), MISTAKES, ids=[message for _, _, message in MISTAKES])
def test_wrong_questions_exit_with_2(
    spec: str, options: list[str], message: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = list(sys.path)
    code, out, err = run(capsys, spec.format(module=module), *options, "--path", str(tmp_path))
    assert (code, out) == (2, "") and err.startswith("[LRP") and message in err and "hint: " in err
    assert sys.path == before


@pytest.mark.parametrize(("factory", "own"), [("failing", "the factory's own"), ("broken", "the model's own")])
def test_errors_of_the_users_code_stay_theirs(
    factory: str, own: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, f"{module}:{factory}", "--path", str(tmp_path))
    assert code == 2 and err.startswith("Traceback") and own in err and "LRP0" not in err


def test_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["coverage"])
    assert "module:factory" in capsys.readouterr().err


def test_the_console_script_is_this_command(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (declared,) = tmp_path.glob("*.egg-info")
    (script,) = metadata.Distribution.at(declared).entry_points.select(group="console_scripts")
    assert script.name == "lrp-compiler" and script.load() is main
