"""The parts of pages that come from the code: every command's help, the library's names, tables of constants.

Signatures, fields and their docstrings are read from the source, so that they are written there alone.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import typer

import attention
import planner
from attention.config import AdaptiveConfig, AttentionConfig, PatternType, SparsePatternConfig
from attention.features import Feature, unfit_feature
from attention.sizes.whole_calls import CUDNN_CAPABILITIES
from planner.cli.app import app
from planner.cli.main import main
from planner.gpus import Gpu, find
from planner.quality.profiles import ASSUMED, DEFAULT, PRESETS
from planner.question.space import MAX_BRANCHES, Space
from planner.search import candidates
from planner.speed.gpu_kernels import kernel_name
from planner.speed.rates import default_rates
from studies.bench.records import markdown

WIDTH: Final = 88
"""Columns of help and of signatures."""
WRITTEN: Final = "Written by `python -m studies.handbook.pages` from the code."
NAMES: Final[dict[str, tuple[str, Sequence[str]]]] = {
    "attention": ("What runs.", attention.__all__),
    "planner": ("What decides.", planner.__all__),
    "planner.question.asked": ("Keyword arguments of `planner.recommend`.", ("Asked",)),
    "planner.answers.recommendation": (
        "Parts of a recommendation.",
        ("Search", "Pick", "Quality", "Why", "Without"),
    ),
    "planner.answers.tuned": ("A trial of tuning.", ("Trial",)),
    "planner.answers.verified": ("A pick as it ran.", ("Verified",)),
    "planner.gpus": ("Known cards.", ("Gpu", "find", "known", "matching", "generic")),
    "planner.quality.profiles": ("How dense attention's mass is spread over distance.", ("preset",)),
    "planner.quality.profile_file": ("Profiles measured from q and k.", ("profile_from",)),
    "planner.quality.mass": ("The mass that a config keeps.", ("mass_of",)),
    "planner.quality.reach": ("The reach of a config, in layers.", ("layers",)),
    "planner.speed.rates": ("Seconds per unit of work on a device.", ("Rates", "default_rates")),
    "planner.memory.allocator": (
        "PyTorch's caching allocator, replayed.",
        ("replay", "Replay", "Oom", "fits", "smallest_cap", "Allocator"),
    ),
    "planner.memory.allocator_settings": ("Its settings.", ("AllocatorSettings",)),
    "planner.calibration": ("The result of measuring a device.", ("load", "Terms", "Domain", "SpeedFit")),
    "planner.measuring.records": ("Measurements in files.", ("append", "read")),
    "planner.search.verify": ("Picks, run here.", ("verify",)),
    "attention.config": ("Base of all values.", ("Value",)),
}
"""The names on the library's page, and a line about them, by module."""


# The command line.


def command_line() -> str:
    """The page of all commands: the output of `--help` of each."""
    group: Any = typer.main.get_command(app)
    codes = " ".join((main.__doc__ or "").partition(": ")[2].split())
    parts = [
        "# Command line",
        f"{WRITTEN} `planner COMMAND --help` prints the same; `planner` is also `python -m planner`.",
        f"Exit codes: {codes}",
        _fence(_help(group, "planner"), "text"),
    ]
    for name, command in group.commands.items():
        parts += [f"## planner {name}", _fence(_help(command, f"planner {name}"), "text")]
    return "\n\n".join(parts) + "\n"


def _help(command: Any, name: str) -> str:
    context = command.make_context(
        name, [], resilient_parsing=True, terminal_width=WIDTH, max_content_width=WIDTH
    )
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def _fence(body: str, language: str) -> str:
    return f"```{language}\n{body}\n```"


# The library.


def library() -> str:
    """The page of the library: the signature and docstring of every public name."""
    parts = ["# Library", f"{WRITTEN} Names of other modules may change from one version to the next."]
    for module, (about, names) in NAMES.items():
        parts += [f"## {module}", about]
        home = import_module(module)
        for name in names:
            parts += list(_entry(home, name))
    return "\n\n".join(parts) + "\n"


def _entry(home: ModuleType, name: str) -> Iterator[str]:
    member = getattr(home, name)
    [node] = ast.parse(textwrap.dedent(inspect.getsource(member))).body
    node = _Plain(import_module(member.__module__)).visit(node)
    yield f"### {name}"
    if isinstance(node, ast.FunctionDef):
        yield _fence(_signature(node), "python")
        yield inspect.getdoc(member) or ""
    elif isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        yield _fence(f"class {name}({bases})" if bases else f"class {name}", "python")
        yield _about(node)
        members = [*_fields(node), *_methods(node)]
        if members:
            yield "\n".join(members)


class _Plain(ast.NodeTransformer):
    """Replaces types and constants by what a reader understands without the module: `int` for `Positive`."""

    def __init__(self, module: ModuleType) -> None:
        self.names = vars(module)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
            return self.visit(node.slice.elts[0])
        return self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        # `16 * MIB` says more than its product; unions of types are another matter.
        return self.generic_visit(node) if isinstance(node.op, ast.BitOr) else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        value = self.names.get(node.id)
        if node.id.isupper() and isinstance(value, int | float | str):
            return ast.Constant(value)
        if get_origin(value) in (Annotated, Literal, Union, UnionType, tuple):
            return ast.Name(_plain(value))
        return node


def _plain(kind: Any) -> str:
    """The name of a type, without its validators."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _plain(inside[0])
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, inside))}]"
    if origin in (Union, UnionType):
        return " | ".join(map(_plain, inside))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_plain, inside))}]"
    return {Ellipsis: "...", NoneType: "None"}.get(kind) or str(getattr(kind, "__name__", kind))


def _signature(node: ast.FunctionDef) -> str:
    """A function's signature in one line, or with a line for each argument where that is too long."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = _arguments(node.args)
    short = f"{node.name}({', '.join(arguments)}){returns}"
    if len(short) <= WIDTH:
        return short
    return f"{node.name}(\n" + "".join(f"    {line},\n" for line in arguments) + f"){returns}"


def _arguments(arguments: ast.arguments) -> list[str]:
    first = len(arguments.args) - len(arguments.defaults)
    texts = [
        _argument(one, arguments.defaults[at - first] if at >= first else None)
        for at, one in enumerate(arguments.args)
    ]
    if arguments.vararg or arguments.kwonlyargs:
        texts.append("*" + (ast.unparse(arguments.vararg) if arguments.vararg else ""))
    texts += [_argument(*one) for one in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        texts.append(f"**{ast.unparse(arguments.kwarg)}")
    return texts


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default is not None else "")


def _about(node: ast.ClassDef | ast.FunctionDef) -> str:
    return ast.get_docstring(node) or ""


def _fields(node: ast.ClassDef) -> Iterator[str]:
    """A line for each field: its name, type, default, and the docstring under it."""
    for at, each in enumerate(node.body):
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        if each.target.id.startswith("_"):
            continue
        after = node.body[at + 1] if at + 1 < len(node.body) else None
        text = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = " ".join(inspect.cleandoc(str(after.value.value)).split())
        default = _default(each.value)
        yield (
            f"- `{each.target.id}`: `{ast.unparse(each.annotation)}`"
            + f", default `{default}`" * bool(default)
            + f". {text}" * bool(text)
        )


def _default(value: ast.expr | None) -> str:
    """The default as the source has it, taken out of pydantic's `Field`."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("Field", "field"):
        return next((ast.unparse(one.value) for one in value.keywords if one.arg == "default"), "")
    return "" if value is None else ast.unparse(value)


def _methods(node: ast.ClassDef) -> Iterator[str]:
    """A line for each public method or property: its signature and its docstring."""
    for each in node.body:
        if not isinstance(each, ast.FunctionDef) or each.name.startswith("_"):
            continue
        returns = ast.unparse(each.returns) if each.returns else ""
        if {ast.unparse(one) for one in each.decorator_list} & {"property", "cached_property"}:
            signature = f"`{each.name}`: `{returns}`"
        else:
            signature = f"`{each.name}({', '.join(_arguments(each.args)[1:])}) -> {returns}`"
        about = " ".join(_about(each).split())
        yield f"- {signature}" + f". {about}" * bool(about)


# Constants.


def profiles_table() -> str:
    """Markdown: the preset profiles."""
    rows = [
        (
            f"`{name}`" + " (default)" * (name == DEFAULT),
            f"{profile.sink_mass:g}",
            ", ".join(f"{a:g} at {b:g}" for a, b in zip(profile.shares, profile.scales, strict=True)),
            f"{profile.far_mass:g}",
            profile.source.removesuffix(ASSUMED),
        )
        for name, profile in PRESETS.items()
    ]
    return markdown(rows, ["preset", "sinks", "exponentials: share at scale, tokens", "far", "after"])


def grid_table() -> str:
    """Markdown: the dimensions of the grid and of the full search space."""

    def each(values: Sequence[float]) -> str:
        return ", ".join(f"{value:,g}" for value in values)

    def ends(values: Sequence[float]) -> str:
        return f"{len(values)} from {min(values):,g} to {max(values):,g}"

    def mebibytes(values: Sequence[int]) -> list[float]:
        return [value / (1 << 20) for value in values]

    def powers(exponents: tuple[int, int]) -> str:
        low, high = mebibytes([1 << power for power in exponents])
        return f"powers of two from {low:g} to {high:g}"

    rows = [
        ("attention", ", ".join(Space().kinds), "the same"),
        (
            "block size",
            f"{each(candidates.BLOCK_SIZES)}; dilated_sparse not the last",
            ends(candidates.FREE_BLOCK_SIZES),
        ),
        ("window", "powers of two blocks and three times those, until all is kept", "any number of blocks"),
        (
            "global tokens",
            each(candidates.GLOBAL_TOKENS),
            f"any blocks, to {candidates.MOST_GLOBAL:,} tokens",
        ),
        ("edges of windows", "`block`; where kernels have windows of their own, `token` too", "the same"),
        ("fraction of blocks kept", each(candidates.RATIOS), f"{candidates.LEAST_RATIO:g} to 1"),
        ("branches", f"1 to {MAX_BRANCHES}, dilated_sparse to 3", f"1 to {MAX_BRANCHES}"),
        ("first segment, dilated", each(candidates.SEGMENTS), "any"),
        ("first segment, dilated_sparse", each(candidates.SPARSE_SEGMENTS), "any"),
        (
            "growth of segments from branch to branch",
            f"{each(candidates.GROWTHS)}; dilated_sparse {candidates.GROWTHS[-1]}",
            f"any to {candidates.MOST_GROWTH:,}",
        ),
        ("growth of rates", each(candidates.GROWTHS), f"any to {candidates.MOST_RATE_GROWTH}"),
        ("workspace, MiB", each(mebibytes(candidates.WORKSPACES)), powers(candidates.FREE_WORKSPACES)),
        ("backend", "`auto`; where that is FlexAttention, `sdpa` too", "the same"),
    ]
    return markdown(rows, ["dimension", "the grid", "the full space"])


CARDS: Final = ("gtx1080", "v100-sxm2-16gb", "rtx4090", "a100-sxm4-80gb", "h100", "b200")
WIDTHS: Final = (64, 128)
"""Channels a head."""


def rates_table() -> str:
    """Markdown: the share of its peak in float16 that a card is assumed to reach, if it was not measured."""
    head = [f"{step}, {width} channels" for step in ("forward", "backward") for width in WIDTHS]
    return markdown([_rates_row(find(name)) for name in CARDS], ["card", "capability", *head])


def _rates_row(gpu: Gpu) -> list[str]:
    rates = default_rates(gpu)
    shares = []
    cudnn = gpu.capability[0] in CUDNN_CAPABILITIES
    for costs, flops in ((rates.forward["float16"], 4), (rates.backward["float16"], 10)):
        for width in WIDTHS:
            kernel = "cudnn" if cudnn else kernel_name(gpu.capability, width, 2)
            seconds = costs[f"{kernel}.work"] * width + costs[f"{kernel}.pairs"]
            shares.append(f"{flops * width / seconds / rates.peak['float16']:.0%}")
    return [gpu.name, ".".join(map(str, gpu.capability)), *shares]


FEATURES: Final[dict[Feature, str]] = {
    "queries": "fewer queries than keys",
    "documents": "documents, padding",
    "sinks": "learned sinks",
    "weights": "weights",
}


def features_table() -> str:
    """Markdown: which attention takes which feature."""
    pattern = SparsePatternConfig(block_size=64)
    scorer = AdaptiveConfig(num_heads=1, head_dim=64)
    branches: Any = {"segment_lengths": (64,), "dilation_rates": (1,)}
    kinds: dict[str, AttentionConfig] = {
        "dense": AttentionConfig(variant="dense"),
        "dilated": AttentionConfig(variant="dilated", **branches),
    }
    for kind in get_args(PatternType):
        of_kind = pattern.model_copy(update={"pattern_type": kind})
        kinds[kind] = AttentionConfig(variant="block_sparse", pattern=of_kind, **branches)
    kinds["adaptive"] = AttentionConfig(variant="adaptive", pattern=pattern, adaptive=scorer)
    kinds["block_sparse, backend flex"] = kinds["local_window"].model_copy(update={"backend": "flex"})
    kinds["any, backend flash or cudnn"] = AttentionConfig(variant="dense", backend="flash")
    rows = [
        (name, *("refused" if unfit_feature(config, feature) else "done" for feature in FEATURES))
        for name, config in kinds.items()
    ]
    return markdown(rows, ["attention", *FEATURES.values()])


TABLES: Final[dict[str, Callable[[], str]]] = {
    "features": features_table,
    "profiles": profiles_table,
    "grid": grid_table,
    "default-rates": rates_table,
}
"""Tables of constants, by name."""
