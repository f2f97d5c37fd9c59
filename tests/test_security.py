"""Configurations and files are data: nothing of this repository runs code that they carry, unless a user names it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .code_rules import violations

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("trl_custom_losses", "scripts", "recipes") for path in (ROOT / folder).rglob("*.py")
)
#: The functions that import what a user's configuration names, by an import path in it.
IMPORTERS = {"trl_custom_losses/adapters.py": 1, "trl_custom_losses/trainers/launch.py": 1}


def test_no_source_runs_what_data_carry() -> None:
    assert len(SOURCES) > 100
    found = {str(path.relative_to(ROOT)): violations(path.read_text(encoding="utf-8")) for path in SOURCES}
    importing = {name: sum(line.endswith("import of a name") for line in lines) for name, lines in found.items()}
    assert {name: count for name, count in importing.items() if count} == IMPORTERS
    others = {name: [line for line in lines if not line.endswith("import of a name")] for name, lines in found.items()}
    assert {name: lines for name, lines in others.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import pickle", "pickle"),
        ("frame.to_pickle('x')", "pickle"),
        ("import torch\nload = torch.load", "torch.load"),
        ("import torch\ntorch.serialization.load('x')", "torch.load"),
        ("import torch\ngetattr(torch, 'load')('x')", "a name in a string"),
        ("import builtins\nbuiltins.exec('x')", "exec"),
        ("import asyncio\nasyncio.create_subprocess_shell('ls')", "a shell"),
        ("import pkgutil\npkgutil.resolve_name(name)", "import of a name"),
        ("d['trust_remote_code'] = True", "trust_remote_code"),
        ("d.setdefault('trust_remote_code', True)", "trust_remote_code"),
        ("import cloudpickle as c", "pickle"),
        ("from dill import loads", "pickle"),
        ("import marshal", "pickle"),
        ("import shelve", "pickle"),
        ("from joblib import load", "pickle"),
        ("def f():\n    import pickle", "pickle"),
        ("import torch\ntorch.save({}, 'x')", "pickle"),
        ("import pandas as pd\npd.read_pickle('x')", "pickle"),
        ("import numpy as np\nnp.load('x', allow_pickle=True)", "pickle"),
        ("import numpy as np\nnp.load('x', allow_pickle=flag)", "pickle"),
        ("model.save_pretrained('x', safe_serialization=False)", "pickle"),
        ("import yaml\nyaml.load(text)", "unsafe yaml"),
        ("import yaml as y\ny.load(text, Loader=y.Loader)", "unsafe yaml"),
        ("import yaml\nyaml.load(text, yaml.FullLoader)", "unsafe yaml"),
        ("import yaml\nyaml.unsafe_load(text)", "unsafe yaml"),
        ("from yaml import load\nload(text)", "unsafe yaml"),
        ("from yaml import unsafe_load as f", "unsafe yaml"),
        ("from yaml import *", "star import"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("import torch as t\nt.load('x', weights_only=False)", "torch.load"),
        ("from torch import load\nload('x', weights_only=flag)", "torch.load"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("compile(text, 'x', 'exec')", "compile"),
        ("import builtins\n__import__(name)", "__import__"),
        ("import runpy\nrunpy.run_path(path)", "runpy"),
        ("AutoModel.from_pretrained('x', trust_remote_code=True)", "trust_remote_code"),
        ("kwargs = {'trust_remote_code': True}", "trust_remote_code"),
        ("args.trust_remote_code = True", "trust_remote_code"),
        ("trust_remote_code: bool = True", "trust_remote_code"),
        ("def f(a, trust_remote_code=True): pass", "trust_remote_code"),
        ("def f(*, trust_remote_code=True, b=1): pass", "trust_remote_code"),
        ("p.add_argument('--trust_remote_code', default=True)", "trust_remote_code"),
        ("p.add_argument('--trust_remote_code', action='store_false')", "trust_remote_code"),
        ("import os\nos.system('ls')", "a shell"),
        ("from os import popen as p\np('ls')", "a shell"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "a shell"),
        ("from subprocess import run\nrun('ls', shell=flag)", "a shell"),
        ("import importlib\nimportlib.import_module(name)", "import of a name"),
        ("from importlib import import_module\nimport_module(f'{name}.losses')", "import of a name"),
    ],
)
def test_the_reader_finds_it(source: str, what: str) -> None:
    assert [line for line in violations(source) if line.endswith(f": {what}")]


@pytest.mark.parametrize(
    "source",
    [
        "import yaml\nyaml.safe_load(text)\nyaml.load(text, Loader=yaml.SafeLoader)\nyaml.safe_dump({})",
        "import torch\ntorch.load('x', weights_only=True)\nmodel.eval()\nmodule.load('x')",
        "f(trust_remote_code=False)\nf(trust_remote_code=args.trust_remote_code)\nd = {'trust_remote_code': value}",
        "def f(b=True, trust_remote_code=False): pass\np.add_argument('--trust_remote_code', action='store_true')",
        "import subprocess\nsubprocess.run(['ls'], shell=False)\nimport re\nre.compile('a')",
        "import numpy as np\nnp.load('x')\nnp.load('x', allow_pickle=False)",
        "import importlib\nimportlib.import_module('torch')\nimportlib.import_module(f'{__name__}.losses')",
    ],
)
def test_the_reader_leaves_alone_what_is_safe(source: str) -> None:
    assert violations(source) == []


def test_no_recipe_lets_remote_code_run_or_holds_a_tag() -> None:
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(recipes) > 10
    for path in recipes:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))  # fails on a tag of Python
        assert not settings.get("trust_remote_code"), path


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.mkdir ['{0}']", "!!python/object/new:os.mkdir ['{0}']", "!!python/name:os.mkdir"],
)
@pytest.mark.parametrize("key", ["loss_function", "output_dir", "env"])
def test_a_yaml_that_would_make_python_objects_is_refused(key: str, value: str, tmp_path: Path) -> None:
    from trl import ScriptArguments

    from trl_custom_losses import CustomDPOConfig, LossConfigError
    from trl_custom_losses.trainers import launch

    path = tmp_path / "config.yaml"
    path.write_text(f"model_name_or_path: x\n{key}: {value.format(tmp_path / 'made')}\n")
    words = ["--config", str(path), "--use_cpu", "true", "--bf16", "false"]
    with pytest.raises(LossConfigError, match=r"(?s)not plain YAML.*could not determine a constructor.*python/"):
        launch.parse(words, ScriptArguments, CustomDPOConfig)
    assert not (tmp_path / "made").exists()


def test_an_adapter_in_a_pickle_does_not_run(dense_model: Path, tmp_path: Path) -> None:
    from trl import ModelConfig

    from trl_custom_losses.trainers import CustomDPOConfig, launch

    from .trainers.adapters import save_adapter

    adapter = save_adapter(tmp_path / "adapter", dense_model)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    training = CustomDPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False)
    with pytest.raises(pickle.UnpicklingError):
        launch.load_model(ModelConfig(str(adapter)), training)
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").exists(), "the payload does nothing"


def test_modules_are_imported_only_when_a_user_names_them(tmp_path: Path) -> None:
    """Names, known or not, import nothing, though modules of those names lie on the path."""
    for name in ("sigmoid", "intruder", "composed", "accuracy_reward", "named"):
        (tmp_path / f"{name}.py").write_text("def loss(batch, outputs):\n    return outputs.logps, {}\n")
    program = """
import sys
from trl_custom_losses import LossConfigError, LossFunctionRegistry
from trl_custom_losses.trainers import launch

NAMES = {"sigmoid", "intruder", "composed", "accuracy_reward", "named"}

def refused(make, *arguments, **options):
    try:
        make(*arguments, **options)
    except LossConfigError:
        return
    raise SystemExit(f"{arguments} was taken")

LossFunctionRegistry.names()
LossFunctionRegistry.build("sigmoid")
LossFunctionRegistry.build({"type": "composed", "components": [{"type": "sigmoid", "name": "intruder"}]})
launch.load_reward("accuracy_reward")
for wrong in ("intruder", "intruder.loss", "../intruder", "intruder.py"):
    refused(LossFunctionRegistry.build, {"type": wrong})
    refused(LossFunctionRegistry.build, {"type": "composed", "components": [{"type": wrong}]})
refused(LossFunctionRegistry.build, {"type": "sigmoid", "beta": "intruder:loss"})
refused(launch.load_reward, "intruder")
assert not NAMES & set(sys.modules), NAMES & set(sys.modules)
LossFunctionRegistry.build({"type": "named:loss"}, family="preference")
assert NAMES & set(sys.modules) == {"named"}
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
