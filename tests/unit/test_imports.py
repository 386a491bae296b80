"""ray, deepspeed, mlflow and bitsandbytes: each in one module, inside functions, and never needed by the unit tests."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "flipkd_dist"
OWNERS = {
    "ray": {
        "ray_launch.py",
        "ray_meeting.py",
        "ray_pool.py",
        "ray_storage.py",
        "ray_process.py",
        "ray_head.py",
        "ray_watch.py",
        "ray_job.py",
    },
    "deepspeed": {"engine.py"},
    "mlflow": {"tracking.py", "pyfunc_model.py"},
    "bitsandbytes": {"fourbit.py"},
    "sentence_transformers": {"sentence_teacher.py", "teach_trainer.py"},
    "openai": {"endpoint_teacher.py"},
    "matplotlib": {"plot_svg.py"},
    "faiss": {"vector_search.py"},
    "pytrec_eval": {"retrieval_metrics.py"},
    "mteb": {"mteb_model.py"},
}
UNIT_TESTED = {
    "sentence_transformers",
    "openai",
    "matplotlib",
    "faiss",
    "pytrec_eval",
    "mteb",
}  # libraries that unit tests do use
RUN_AS_CODE = "pyfunc_model.py"  # mlflow executes it, so that mlflow is there
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({list(OWNERS)}))"  # None: importing it raises ImportError


def imports(source: str) -> list[tuple[str, bool]]:
    """(top-level name, whether it is inside a function) of every import of a module."""
    found = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name.split(".")[0], inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module.split(".")[0], inside))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            found.extend((argument.value.split(".")[0], inside) for argument in node.args[:1])
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(source), False)
    return found


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", f"{BLOCK}; {code}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)


def test_the_reader_of_imports_sees_all_kinds():
    outside = "import a.b, c\nfrom d.e import f\nfrom . import g\n"
    inside = "def h():\n  import i\n  class J:\n    import k\n"
    source = f"{outside}{inside}class L:\n  import m\nimportlib.import_module('n.o')\n"
    assert imports(source) == [
        ("a", False),
        ("c", False),
        ("d", False),
        ("i", True),
        ("k", True),
        ("m", False),
        ("n", False),
    ]


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_in_its_own_module_inside_functions(library):
    modules = {path.name: imports(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}
    importing = {name for name, found in modules.items() if library in dict(found)}
    assert importing <= OWNERS[library]
    assert importing
    outside = {name for name in importing if (library, False) in modules[name]}
    assert outside <= {RUN_AS_CODE}


def test_the_block_blocks():
    for library in OWNERS:
        failed = run(f"import {library}")
        assert failed.returncode == 1 and f"import of {library} halted" in failed.stderr


def test_the_package_is_imported_without_them():
    paths = sorted(path.relative_to(ROOT).with_suffix("") for path in PACKAGE.rglob("*.py"))
    names = [".".join(path.parts) for path in paths if path.name not in (Path(RUN_AS_CODE).stem, "__main__")]
    assert len(names) > 30 and {"flipkd_dist.cli", "flipkd_dist.ray_launch", "flipkd_dist.samples.demo"} <= {*names}
    done = run("import importlib; [importlib.import_module(name) for name in sys.argv[1:]]; print('all')", *names)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr


def test_every_help_answers_without_torch():
    slow = "sys.modules.update(dict.fromkeys(['torch', 'transformers']))"
    every = "[cli.main([*verb, '--help'], standalone_mode=False) for verb in [[], *zip(cli.commands)]]"
    done = run(f"{slow}; from flipkd_dist.cli import cli; {every}")
    assert done.returncode == 0 and done.stdout.count("Usage: ") > 15, done.stderr


def test_unit_tests_cannot_import_them(absent_libraries):
    for library in absent_libraries:
        with pytest.raises(ImportError):
            importlib.import_module(library)
    assert {*absent_libraries} == OWNERS.keys() - UNIT_TESTED
