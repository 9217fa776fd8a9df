"""Facts about the package as a whole: its layout, its start-up, its rules."""

import ast
import itertools
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mien

ROOT = Path(mien.__file__).parent
ROOMS = ["cli", "benchmarks", "core", "models", "kernels"]  # imports run down this list only
CORE = [  # and so they do inside core
    *("convert", "training", "distribute", "exchange", "swapping", "history", "preview"),
    *("blend", "evaluate", "optim", "losses", "estimate", "data", "faces", "console"),
    *("checkpoint", "precision", "config", "system"),
]

PAGES = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
FRAGMENTS = """
    Of That In To Also By From At As On For With Without Within While When Where Wherein Which Who
    Whom Whose Why Given Those These This It Its No None Nothing Nobody Between Over Under Above
    Below After Before Until Since If Because So Less And Or But There They
""".split()  # a docstring that begins so is no sentence, and names nothing


def _modules(room):
    return sorted((ROOT / room).rglob("*.py"))


def _imports(path):
    """What a module imports of mien, relatively or absolutely, as the parts of dotted names."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            elif base[0] != "mien":
                continue
            else:
                base = base[1:]
            yield from (base + (alias.name,) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "mien":
                    yield tuple(rest)


def _imported_rooms(path):
    """Rooms that a module imports from."""
    return {name[0] for name in _imports(path) if name and name[0] in ROOMS}


def _imported_rooms_of_core(path):
    """Rooms of core, and modules beside them, that a module imports from."""
    return {name[1] for name in _imports(path) if name[0:1] == ("core",) and len(name) > 1}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room):
    below = set(ROOMS[ROOMS.index(room) :])
    for path in _modules(room):
        upward = _imported_rooms(path) - below
        assert not upward, f"{path.relative_to(ROOT)} imports from {sorted(upward)}"


@pytest.mark.parametrize("room", CORE)
def test_imports_run_one_way_inside_core(room):
    below = set(CORE[CORE.index(room) :])
    files = _modules(f"core/{room}") or [ROOT / f"core/{room}.py"]
    for path in files:
        upward = _imported_rooms_of_core(path) - below
        assert not upward, f"{path.relative_to(ROOT)} imports from {sorted(upward)}"


def test_every_room_of_core_has_its_place():
    paths = [path for path in (ROOT / "core").iterdir() if path.name not in ("__pycache__",)]
    assert sorted(path.stem for path in paths) == sorted([*CORE, "__init__"])


def _hidden_modules(init):
    """Modules of a package that a function, class or import of its `__init__.py` hides."""
    inside = {path.stem for path in init.parent.iterdir() if path.suffix == ".py"}
    inside |= {path.parent.name for path in init.parent.glob("*/__init__.py")}
    names = set()
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name for alias in node.names}
    return sorted(names & inside)


@pytest.mark.parametrize("room", ROOMS)
def test_no_name_of_a_package_hides_one_of_its_modules(room):
    for init in (ROOT / room).rglob("__init__.py"):
        assert not _hidden_modules(init), init.relative_to(ROOT)


def test_the_check_of_hidden_modules_sees_them(tmp_path):
    for name, code in {
        "__init__": "from . import plain\nfrom .enlarge import enlarge\ndef draw(): pass",
        "enlarge": "",
        "draw": "",
        "plain": "",
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
    assert _hidden_modules(tmp_path / "__init__.py") == ["draw", "enlarge"]


def _constants_of_places(tree):
    """(name, place) of each constant that a kernel takes of an enumeration of places."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets, values = node.targets[0], node.value
            is_tuple = isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple)
            pairs = zip(targets.elts, values.elts, strict=True) if is_tuple else [(targets, values)]
            for target, value in pairs:
                if found := re.fullmatch(r"tl\.constexpr\(\w+\.(\w+)\)", ast.unparse(value)):
                    yield target.id, found[1]


def test_a_constant_of_a_kernel_has_the_name_of_its_place():
    """Else a kernel would read another scalar, or another column, than it says."""
    pairs = [
        pair
        for path in _modules("kernels")
        for pair in _constants_of_places(ast.parse(path.read_text()))
    ]
    assert len(pairs) > 30
    assert [name for name, place in pairs if name != f"_{place}"] == []


def test_the_import_check_sees_imports():
    assert "losses" in _imported_rooms_of_core(ROOT / "core/training/step.py")
    assert "core" in _imported_rooms(ROOT / "cli/train.py")
    assert "models" in _imported_rooms(ROOT / "core/training/step.py")


def test_nothing_dangerous_is_called():
    banned = {"eval", "exec", "compile", "__import__"}
    for room in ROOMS:
        for path in _modules(room):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in banned, f"{path}:{node.lineno}"
                if isinstance(node, ast.Import):
                    assert "pickle" not in {a.name for a in node.names}, f"{path}:{node.lineno}"
                if isinstance(node, ast.ImportFrom):
                    assert node.module != "pickle", f"{path}:{node.lineno}"


ARGUMENTS = re.compile(r"^ *Args:\n(.*?)(?=\n *(?:Raises|Returns|Yields):|\Z)", re.M | re.S)


def _texts(tree):
    """Docstrings of modules, classes, functions, attributes, arguments, with their line numbers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, node.value.value.strip()
                for arguments in ARGUMENTS.findall(node.value.value):
                    for text in re.findall(r"^ *\w+: (\S.*)", arguments, re.M):
                        yield node.lineno, text


@pytest.mark.parametrize("room", ROOMS)
def test_docstrings_are_sentences_or_name_something(room):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in _modules(room)
        for line, text in _texts(ast.parse(path.read_text()))
        if re.match(r"\w*", text)[0] in FRAGMENTS
    ]
    assert not found, "a docstring begins with a noun or a verb:\n" + "\n".join(found)


def test_the_docstring_check_sees_attributes_and_arguments():
    code = '''"""A module."""\nclass A:\n    seconds: float\n    """That they took."""\n'''
    assert list(_texts(ast.parse(code))) == [(1, "A module."), (4, "That they took.")]
    code = (
        '"""F.\n\nArgs:\n    a: Of it.\n    b: Two,\n        of it.\n\nRaises:\n    E: At c.\n"""'
    )
    assert [text for _, text in _texts(ast.parse(code))][1:] == ["Of it.", "Two,"]


MOST_LINES = {ast.FunctionDef: 60, ast.AsyncFunctionDef: 60, ast.ClassDef: 300}


def _num_lines(node):
    """Lines of a function without its docstring, or of a whole class."""
    if isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None:
        return node.end_lineno - node.lineno + 1
    docstring = node.body[0]
    return node.end_lineno - node.lineno - (docstring.end_lineno - docstring.lineno)


@pytest.mark.parametrize("room", ROOMS)
def test_functions_and_classes_are_read_in_one_sitting(room):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {_num_lines(node)} lines"
        for path in _modules(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if type(node) in MOST_LINES and _num_lines(node) > MOST_LINES[type(node)]
    ]
    assert not found, "a function has at most 60 lines, a class 300:\n" + "\n".join(found)


def test_the_check_of_sizes_leaves_out_a_docstring_and_counts_the_rest():
    code = 'def f(\n    a,\n):\n    """F.\n\n    Two.\n    """\n    return a\n'
    (function,) = ast.parse(code).body
    assert _num_lines(function) == 4
    (whole,) = ast.parse('class A:\n    """A."""\n\n    a: int\n').body
    assert _num_lines(whole) == 4


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(PAGES)])
def test_links_and_pictures_of_a_page_are_there(page):
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}, which is not there"


def test_the_readme_is_short_and_names_files_that_are_there():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) < 900, "what is longer has a page of its own in docs"
    room, numbers = "", []
    for line in text.partition("## The code")[2].partition("##")[0].splitlines():
        if found := re.match(r"    (\w+/)  ", line):
            room = found[1]
        elif found := re.match(r"      ([\w/.]+) +(\d)  ", line):
            assert (ROOT / room / found[1]).is_file(), f"README.md names {room}{found[1]}"
            numbers.append(found[2])
    assert sorted(numbers) == list("12345")


def test_help_is_light():
    """`mien --help` and every command's help start without torch."""
    from mien.cli import COMMANDS

    code = (
        "import sys, mien.cli\n"
        "try: mien.cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    for words in ([], *([name] for name in COMMANDS)):
        command = [sys.executable, "-c", code, *words, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"`mien {' '.join(words)} --help` imported torch"
        assert "usage:" in done.stdout


def test_one_copy_of_the_package():
    files = {n: m.__file__ for n, m in sys.modules.items() if getattr(m, "__file__", None)}
    ours = {
        name
        for name, file in files.items()
        if Path(file).is_relative_to(ROOT)
        and Path(file).relative_to(ROOT).parts[0] != "tests"
        and not Path(file).is_relative_to(sys.prefix)
    }
    assert all(name.split(".")[0] == "mien" for name in ours), sorted(ours)


def test_the_lowest_versions_are_those_that_are_allowed():
    """`make test-min` installs what pyproject.toml allows at the least, of every dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lowest = set()
    for requirement in [*project["dependencies"], *itertools.chain(*extras)]:
        name, version = re.match(r"([\w-]+)(?:>=([\d.]+)|\[)", requirement).groups()
        lowest |= {f"{name}=={version}"} if version else set()
    lines = (ROOT / "tests/minimum.txt").read_text().splitlines()
    assert sorted(lowest) == [line for line in lines if not line.startswith("#")]


def test_every_kernel_has_a_reference_a_test_and_a_benchmark():
    from mien.kernels import OPERATIONS, reference

    for name in OPERATIONS:
        assert hasattr(reference, name), f"kernels/reference.py lacks {name}"
        assert (ROOT / f"tests/test_{name}.py").exists()
        assert (ROOT / f"benchmarks/bench_{name}.py").exists()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with mien as a wheel installs it; libmien is a link to that of the tree."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", folder]
    subprocess.run(command, check=True, cwd=ROOT)
    (folder / "mien/kernels/libmien.so").symlink_to(ROOT / "kernels/libmien.so")
    return folder


def test_a_wheel_holds_every_file_that_is_read(installed):
    held = {path.relative_to(installed / "mien") for path in installed.rglob("*") if path.is_file()}
    kept_out = {"csrc", "results", "__pycache__"}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            name = path.relative_to(ROOT)
            if path.is_file() and not kept_out & set(name.parts):
                assert name in held, f"setup.py leaves {name} out of the wheel"
    assert Path("kernels/csrc/include/mien.h") in held
    assert Path("setup.py") not in held
    assert not any("results" in path.parts for path in held)


def _run_installed(folder, *words, code=0):
    """What `python ...` says in a folder of its own, where mien is only installed."""
    away = folder / "work"
    away.mkdir(exist_ok=True)
    environment = {"PATH": os.environ["PATH"], "HOME": str(away), "PYTHONPATH": str(folder)}
    command = [sys.executable, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=away, env=environment
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["mien.cli", "doctor"], "ok  libmien"),
        (["mien.cli", "preset", "show", "original"], "[model]"),
        (["mien.cli", "recipe", "show", "standard"], "standard: Learn until"),
        (["mien.cli.settings_page"], "# Settings"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_an_installed_mien_needs_no_source_tree(installed, words, told):
    assert told in _run_installed(installed, "-m", *words)


def test_an_installed_mien_reports_what_it_has_measured(installed):
    report = ["-m", "mien.cli", "bench", "report"]
    assert "mien bench: no results in" in _run_installed(installed, *report, code=2)
    write = "from mien.benchmarks import harness, launches; harness.write_results([]); "
    _run_installed(installed, "-c", write + "launches.read_budget()")
    assert (installed / "work/.local/state/mien/benchmarks").is_dir()
    assert "cores, torch" in _run_installed(installed, *report)


def test_an_installed_mien_takes_no_other_repository_for_its_own(installed):
    """The environment of a wheel may lie in the folder of the user's own project."""
    git = ["git", "-C", installed, "-c", "user.name=U", "-c", "user.email=u@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], check=True)
    show = "from mien.benchmarks import harness; print(harness.environment()['commit'])"
    assert _run_installed(installed, "-c", show) == "unknown\n"
