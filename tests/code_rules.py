"""Reads Python source for what this repository never does, without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator

#: Modules that run code when they read data.
_PICKLING = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle"}
_FORBIDDEN_CALLS = {
    "eval": "eval",
    "exec": "exec",
    "compile": "compile",
    "__import__": "__import__",
    "os.system": "a shell",
    "os.popen": "a shell",
    "subprocess.getoutput": "a shell",
    "subprocess.getstatusoutput": "a shell",
    "builtins.eval": "eval",
    "builtins.exec": "exec",
    "builtins.compile": "compile",
    "asyncio.create_subprocess_shell": "a shell",
    "torch.save": "pickle",
    "torch.serialization.load": "torch.load",
    "pkgutil.resolve_name": "import of a name",
    "importlib.util.spec_from_file_location": "import of a name",
    "pandas.read_pickle": "pickle",
    "runpy.run_path": "runpy",
    "runpy.run_module": "runpy",
}
_SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}
_UNSAFE_YAML = {"unsafe_load", "unsafe_load_all", "full_load", "full_load_all", "UnsafeLoader", "FullLoader", "Loader"}
_YAML_LOADS = {"yaml.load", "yaml.load_all"}


def _is(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


class _Reader:
    """One file: what its names stand for, and what it does with them."""

    def __init__(self, tree: ast.AST) -> None:
        self.tree = tree
        self.names: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.split(".")[0]
                    self.names[alias.asname or root] = alias.name if alias.asname else root
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.names[alias.asname or alias.name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"

    def dotted(self, node: ast.AST | None) -> str:
        """The full name that an expression spells, empty if it is none."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    def violations(self) -> Iterator[tuple[ast.AST, str]]:
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                yield from self._imports(node)
            elif isinstance(node, ast.Call):
                yield from self._call(node)
            elif isinstance(node, ast.Attribute) and self.dotted(node) in {f"yaml.{name}" for name in _UNSAFE_YAML}:
                yield node, "unsafe yaml"
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "trust_remote_code" and _is(value, True):
                        yield node, "trust_remote_code"
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = {self._assigned(target) for target in targets}
                if "trust_remote_code" in names and _is(node.value, True):
                    yield node, "trust_remote_code"
                if self.dotted(node.value) == "torch.load":  # under a name that would not be recognised
                    yield node, "torch.load"
            elif isinstance(node, ast.arguments):
                positional = [*node.posonlyargs, *node.args]
                defaults = [*zip(positional[::-1], node.defaults[::-1], strict=False)]
                for argument, default in [*defaults, *zip(node.kwonlyargs, node.kw_defaults, strict=True)]:
                    if argument.arg == "trust_remote_code" and _is(default, True):
                        yield argument, "trust_remote_code"

    def _imports(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[ast.AST, str]]:
        names = [alias.name for alias in node.names]
        modules = names if isinstance(node, ast.Import) else [node.module or ""]
        if {module.split(".")[0] for module in modules} & _PICKLING:
            yield node, "pickle"
        if isinstance(node, ast.ImportFrom):
            if names == ["*"]:
                yield node, "star import"  # which hides where a name comes from
            if node.module == "yaml" and set(names) & _UNSAFE_YAML:
                yield node, "unsafe yaml"

    def _call(self, node: ast.Call) -> Iterator[tuple[ast.AST, str]]:
        name = self.dotted(node.func)
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in _FORBIDDEN_CALLS:
            yield node, _FORBIDDEN_CALLS[name]
        if name in _YAML_LOADS:
            loader = options.get("Loader", node.args[1] if len(node.args) > 1 else None)
            if self.dotted(loader) not in _SAFE_LOADERS:
                yield node, "unsafe yaml"
        if name == "torch.load" and not _is(options.get("weights_only"), True):
            yield node, "torch.load"
        if name == "getattr" and len(node.args) > 1:
            named = f"{self.dotted(node.args[0])}.{self._text(node.args[1])}"
            if named == "torch.load" or named.startswith("builtins."):
                yield node, "a name in a string"
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to_pickle":
            yield node, "pickle"
        if _is(options.get("trust_remote_code"), True):
            yield node, "trust_remote_code"
        if [self._text(argument) for argument in node.args[:1]] == ["trust_remote_code"] and any(
            _is(argument, True) for argument in node.args[1:2]
        ):  # setdefault and the like
            yield node, "trust_remote_code"
        words = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        if "--trust_remote_code" in words and (
            _is(options.get("default"), True) or self._text(options.get("action")) == "store_false"
        ):
            yield node, "trust_remote_code"
        for option, meaning in (("shell", "a shell"), ("allow_pickle", "pickle")):
            if option in options and not _is(options[option], False):
                yield node, meaning
        if "safe_serialization" in options and not _is(options["safe_serialization"], True):
            yield node, "pickle"
        if name.endswith("import_module") and node.args and not self._within_this_package(node.args[0]):
            yield node, "import of a name"

    @classmethod
    def _assigned(cls, target: ast.expr) -> object:
        """The last name, or the constant key, that is assigned to."""
        if isinstance(target, ast.Subscript):
            return cls._text(target.slice)
        return getattr(target, "attr", getattr(target, "id", None))

    @staticmethod
    def _text(node: ast.expr | None) -> object:
        return node.value if isinstance(node, ast.Constant) else None

    @staticmethod
    def _within_this_package(node: ast.expr) -> bool:
        """A module named in the source, or one under the module's own package."""
        if isinstance(node, ast.Constant):
            return True
        start = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else None
        own = isinstance(start, ast.FormattedValue) and isinstance(start.value, ast.Name)
        return own and start.value.id in ("__name__", "__package__")


def violations(source: str) -> list[str]:
    """`line: what` for everything in `source` that is not allowed."""
    reader = _Reader(ast.parse(source))
    return sorted({f"{node.lineno}: {what}" for node, what in reader.violations()})
