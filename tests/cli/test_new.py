"""`new`: what it writes is right as it stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trl_custom_losses import LossFunctionRegistry
from trl_custom_losses.cli.new import class_name, rendered

from .running import ROOT, run

VARIANTS = [(family, form) for family in ("preference", "policy") for form in ("function", "class")]
each_variant = pytest.mark.parametrize(("family", "form"), VARIANTS)


@each_variant
def test_what_it_writes_passes_the_kit_and_its_config_builds(family: str, form: str, workshop: Path) -> None:
    name = f"my_{family}_{form}"
    done = run("new", name, "--family", family, "--form", form)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith(f"Wrote {name}.py and test_{name}.py.")
    assert f"  trl-custom-losses check {name}.py\n  pytest test_{name}.py\n" in done.out
    assert f"config of `trl-custom-losses {'dpo' if family == 'preference' else 'grpo'}`:" in done.out
    checked = run("check", f"{name}.py", "--json")
    assert checked.code == 0 and [loss["loss"] for loss in checked.json["losses"]] == [name]
    block = yaml.safe_load(done.out.splitlines()[-1])["loss_function"]
    loss = LossFunctionRegistry.build(block, family=family)
    assert {key: getattr(loss, key) for key in block if key != "type"} == {
        k: v for k, v in block.items() if k != "type"
    }
    assert loss.surrogate == (family == "policy")


def test_the_written_tests_pass_and_can_fail(tmp_path: Path) -> None:
    for family, form in VARIANTS:
        for file, source in rendered(f"{family}_{form}", family, form).items():
            (tmp_path / file).write_text(source)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    passed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert passed.returncode == 0, passed.stdout[-3000:]
    for family, form in VARIANTS:
        path = tmp_path / f"{family}_{form}.py"
        path.write_text(path.read_text().replace("return -", "return 2 * -"))
    failed = subprocess.run([*command, "-k", "by_hand"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and "4 failed" in failed.stdout


@each_variant
@pytest.mark.parametrize("name", ["x", "a_loss_with_a_rather_long_name"])
@pytest.mark.parametrize("settings", ["the project's", "ruff's own"])
def test_what_it_writes_is_clean(family: str, form: str, name: str, settings: str, tmp_path: Path) -> None:
    for file, source in rendered(name, family, form).items():
        (tmp_path / file).write_text(source)
    options = ["--config", str(ROOT / "pyproject.toml")] if settings == "the project's" else ["--isolated"]
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--no-cache", *options, "."]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@each_variant
def test_it_is_documented_typed_and_short(family: str, form: str) -> None:
    source = rendered("my_loss", family, form)["my_loss.py"]
    loss = next(node for node in ast.parse(source).body if isinstance(node, (ast.ClassDef, ast.FunctionDef)))
    docstring = ast.get_docstring(loss)
    assert "loss" in docstring.split("\n\n")[1] and "=" in docstring.split("\n\n")[1] and "Args:" in docstring
    code = len(ast.unparse(loss).splitlines()) - len(docstring.splitlines())
    assert 5 <= code <= 15
    functions = [node for node in ast.walk(loss) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        arguments = [*function.args.args, *function.args.kwonlyargs]
        assert function.returns and all(argument.annotation for argument in arguments if argument.arg != "self")


def test_a_folder_is_made_and_named_in_what_is_printed(workshop: Path) -> None:
    done = run("new", "nested", "--family", "policy", "--folder", "losses/mine")
    assert done.code == 0
    assert (workshop / "losses/mine/nested.py").is_file() and (workshop / "losses/mine/test_nested.py").is_file()
    assert "check losses/mine/nested.py" in done.out and "run from losses/mine:" in done.out


def test_nothing_is_overwritten_without_force(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(workshop))  # as `python -m` has it, so that what was written can be imported
    (workshop / "test_mine.py").write_text("kept")
    done = run("new", "mine", "--family", "policy")
    assert done.code == 1 and "test_mine.py exist" in done.err and "--force" in done.err
    assert not (workshop / "mine.py").exists() and (workshop / "test_mine.py").read_text() == "kept"
    assert run("new", "mine", "--family", "policy", "--force").code == 0
    assert (workshop / "test_mine.py").read_text() != "kept"
    assert run("new", "mine", "--family", "preference", "--force").code == 0
    assert "PreferenceBatch" in (workshop / "mine.py").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sigmoid", "there is a loss named 'sigmoid' already"),
        ("class", "'class' is a keyword"),
        ("1st", "a loss is named by letters, digits and underscores, such as 'my_loss', found '1st'"),
        ("my-loss", "found 'my-loss'"),
        ("a.b", "found 'a.b'"),
        ("../up", "found '../up'"),
        ("mühe", "found 'mühe'"),
        ("torch", "'torch' is a module already"),
        ("statistics", "'statistics' is a module already"),
        ("Tensor", "'Tensor' means something else"),
        ("beta", "'beta' means something else"),
        ("test_x", "pytest would take 'test_x'"),
        ("conftest", "pytest would take 'conftest'"),
    ],
)
def test_names_that_no_loss_can_have_are_refused(name: str, message: str, workshop: Path) -> None:
    done = run("new", name, "--family", "preference")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and message in done.err
    assert list(workshop.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(workshop: Path) -> None:
    (workshop / "file").write_text("")
    done = run("new", "mine", "--family", "policy", "--folder", "file/inside")
    assert done.code == 1 and done.err.startswith("error: could not write to file/inside")
    done = run("new", "mine", "--family", "policy", "--folder", "file")
    assert (done.code, done.err) == (1, "error: could not write to file, which is a file: give a folder\n")


def test_usage_errors() -> None:
    assert run("new", "mine").code == 2
    done = run("new", "mine", "--family", "dpo")
    assert done.code == 2 and "preference" in done.err and "policy" in done.err


@pytest.mark.parametrize(
    ("name", "expected"),
    [("my_loss", "MyLoss"), ("focal", "FocalLoss"), ("kl2_margin", "Kl2MarginLoss"), ("a", "ALoss")],
)
def test_class_names(name: str, expected: str) -> None:
    assert class_name(name) == expected
