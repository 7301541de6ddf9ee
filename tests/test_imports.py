"""What importing costs and what it offers: no torch until it is needed, and exactly these names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("attention", "planner", "studies")

EXPORTS = [
    "AdaptiveConfig",
    "AttentionConfig",
    "AttentionPlannerError",
    "AttentionWeights",
    "ConfigError",
    "DistributedError",
    "InputError",
    "Layout",
    "MultiheadConfig",
    "OutOfMemoryError",
    "ShardingConfig",
    "SparsePatternConfig",
    "UnavailableError",
    "build",
    "build_layout",
    "create_block_sparse_attention",
    "create_dilated_attention",
    "create_multihead_block_sparse",
    "reference_attention",
]

# A config can be made, checked, written and read on a machine that has no torch at all.
ROUND_TRIP = (
    "from attention import AttentionConfig as C; c = C(variant='dense'); assert C.from_json(c.to_json()) == c"
)
WITHOUT_TORCH = [
    "import attention",
    "import attention.config",
    "import attention.errors",
    "from attention import AttentionConfig, SparsePatternConfig, ConfigError",
    "import attention; assert 'build' in dir(attention)",
    "import planner",
    "import studies",
    ROUND_TRIP,
]


def run_fresh(code: str) -> None:
    """Run the code in a new interpreter; fail with its standard error."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_imports_no_torch():
    checked = (
        f"{statement}\nassert 'torch' not in sys.modules, {statement!r}" for statement in WITHOUT_TORCH
    )
    run_fresh("\n".join(("import sys", *checked)))


def test_works_where_torch_is_missing():
    run_fresh("\n".join(("import sys", "sys.modules['torch'] = None", *WITHOUT_TORCH)))


# What a command needs is loaded when it is called: of these nothing, or an answer takes longer.
UNUSED = {
    "--help": "numpy importlib.metadata rich optuna matplotlib planner.measuring.measure "
    "planner.search.recommend planner.calibration planner.gpus attention.sizes.row_bounds",
    "recommend --help": "numpy rich optuna planner.measuring.measure planner.search.recommend",
    "recommend --vram 8GB --seq 4K --trials 1": "numpy.ma asyncio tqdm rich matplotlib scipy pandas "
    "sqlalchemy planner.measuring.measure planner.search.tune planner.search.verify "
    "planner.report.plot.estimate",
}


@pytest.mark.parametrize("line", UNUSED)
def test_a_command_loads_nothing_that_it_does_not_use(line: str):
    unused = set(UNUSED[line].split()) | {"torch"}
    run_fresh(
        "import sys\nfrom planner.cli.main import main\n"
        f"sys.argv = {['planner', *line.split()]!r}\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        f"assert not (loaded := {unused!r} & set(sys.modules)), loaded"
    )


def test_a_command_makes_no_options_but_its_own():
    run_fresh(
        "import planner.cli.app, planner.cli.main\n"
        "made = []\n"
        "for name, make in planner.cli.app._COMMANDS.items():\n"
        "    def noted(name=name, make=make): made.append(name); return make()\n"
        "    planner.cli.app._COMMANDS[name] = noted\n"
        "try: planner.cli.app.app(['gpus', '--name', 'gtx1080'])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert made == ['gpus'], made"
    )


def test_a_progress_bar_that_is_shown_is_tqdms_own():
    run_fresh(
        "import sys, planner.cli.start\nfrom optuna.progress_bar import tqdm as bar\n"
        "assert 'asyncio' not in sys.modules\n"
        "shown = bar(total=2, disable=True)\n"
        "from tqdm.auto import tqdm\n"
        "assert type(shown) is tqdm and bar.format_interval(61) == '01:01'"
    )


def test_values_are_validated_by_schemas_made_when_first_needed():
    run_fresh(
        "from attention.config import AttentionConfig as C\n"
        "assert C.model_config['defer_build'] and not C.__pydantic_complete__\n"
        "C(variant='dense'); assert C.__pydantic_complete__"
    )


def test_exported_names_are_exactly_these():
    import attention

    assert list(attention.__all__) == EXPORTS == sorted(EXPORTS)


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_name_resolves(name: str):
    import attention

    assert getattr(attention, name) is not None
    assert name in dir(attention)


def test_unknown_name_is_an_attribute_error():
    import attention

    with pytest.raises(AttributeError, match="no_such_attention"):
        attention.no_such_attention  # noqa: B018


def imported(path: Path) -> set[str]:
    """The top-level packages that a module imports, wherever in the file it does so."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize(
    "package, forbidden",
    [
        ("attention", {"planner", "studies", "tests"}),
        ("planner", {"studies", "tests"}),
        ("studies", {"tests"}),
    ],
)
def test_arrows_point_one_way(package: str, forbidden: set[str]):
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    wrong = {str(path.relative_to(ROOT)): bad for path in modules if (bad := imported(path) & forbidden)}
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_with_code_is_a_package(package: str):
    """A folder without `__init__.py` works in a checkout and is missing from the wheel."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    folders.discard(ROOT / "planner" / "standin" / "site")  # goes on the path of other programs; package data
    assert not [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()]


def test_the_library_imports_no_compiler():
    """It takes as long as torch itself, and only what is compiled needs it."""
    code = "import sys, attention; attention.build(attention.AttentionConfig(variant='dense'))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch._dynamo' not in sys.modules"], check=True)
