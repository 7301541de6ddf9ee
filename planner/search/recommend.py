"""The way from a question to a recommendation: scenario, grid, trials, steps, reasons. No torch."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, NamedTuple, Unpack, get_args

import numpy as np

from attention.config import AdaptiveConfig, AttentionConfig, SparsePatternConfig, Variant
from attention.errors import ConfigError
from attention.sizes.flex_tiles import unfit_sizes
from attention.sizes.kernel_choice import ON_CUDA_ONLY, unfit_card
from planner import gpus
from planner.answers.recommendation import Pick, Quality, Recommendation, Role, Search
from planner.answers.shared import refuse_idle_links, shared_over
from planner.memory.estimate import MemoryEstimate
from planner.memory.machines import Cuda
from planner.quality.profiles import Profile
from planner.question.asked import LAYERS, MIN_MASS, TRIALS, Asked, Gates, Objective
from planner.question.command import recommend_command
from planner.question.dimensions import variant_of
from planner.question.space import Space
from planner.ranks.links import network_of
from planner.ranks.ring import refuse_sharing
from planner.search.candidates import grid
from planner.search.climb import climbed
from planner.search.evaluate import Point, gain
from planner.search.explain import LOOKED_AT, explain
from planner.search.picks import pick, three, unsurpassed
from planner.search.refine import STARTS, Refined, refine
from planner.search.relax import NothingFitsError, relaxations
from planner.search.samplers import check_sampler
from planner.search.scenario import Scenario
from planner.search.solve import SAME, Solved, enumerate_grid, exact, order, pareto, passing
from planner.speed.rates import speed_rates_of
from planner.storage.study import Storage
from planner.units import parse_bytes, parse_count
from planner.workload import Workload, refuse_features

SHOWN: Final = 16
"""Points of the Pareto set that an answer has."""
MOST_TOKENS: Final = 1 << 36
"""Nobody asks for a longer sequence."""


class Answered(NamedTuple):
    """A question, as the search has it, and its answer."""

    scenario: Scenario
    space: Space
    name: str
    """The question's fingerprint: equal for equal questions."""
    grid: Point | None
    """The exact optimum of the grid."""
    best: Point
    """The grid's optimum, or a better config that trials found."""
    answer: Recommendation


_SIZES: Final = (
    "batch",
    "heads",
    "kv_heads",
    "head_dim",
    "dtype",
    "mode",
    "causal",
    "queries",
    "documents",
    "sinks",
    "gpus",
)
_PLACE: Final = ("calibration", "allocator", "display", "others_bytes", "context_bytes", "threads")


def answered(
    vram: str | int | None = None, seq: str | int | None = None, **options: Unpack[Asked]
) -> Answered:
    """The answer to a call of `planner.recommend`, with the scenario that it rests on."""
    wrong = set(options) - set(Asked.__annotations__)
    if wrong:
        raise TypeError(f"recommend() got unexpected arguments: {', '.join(sorted(wrong))}")
    _refuse_idle(options)
    check_sampler(options.get("sampler", "tpe"))
    scenario, reserved = scenario_of(vram, seq, options)
    space, seed, trials = (
        options.get("space") or Space(),
        options.get("seed", 0),
        options.get("trials", TRIALS),
    )
    check_backend(scenario, space)
    check_features(scenario, space)
    name = fingerprint(scenario, space)
    parts = grid(
        space,
        scenario.workload,
        flex=scenario.flex,
        windows=scenario.windows,
        free_length=scenario.free_length,
    )
    solved = enumerate_grid(scenario, parts)
    refined = None
    if trials:
        storage = options.get("storage")
        store = Storage(storage, options.get("study") or f"recommend-{name[:12]}", name) if storage else None
        refined = refine(
            scenario,
            space,
            _starts(scenario, solved),
            trials=trials,
            sampler=options.get("sampler", "tpe"),
            seed=seed,
            storage=store,
            progress=options.get("progress"),
        )
    best = better(scenario, solved.best, refined.best if refined else None)
    if best is None:
        raise NothingFitsError(scenario, relaxations(scenario, space, solved, reserved), solved.evaluated)
    if trials:
        best = climbed(scenario, space, best)
    answer = _answer(scenario, solved, refined, best, reserved, seed, recommend_command(vram, seq, options))
    return Answered(scenario, space, name, solved.best, best, answer)


def _refuse_idle(options: Asked) -> None:
    """ConfigError for options that would have no effect, and for counts that are none."""
    trials, seed = options.get("trials", TRIALS), options.get("seed", 0)
    if type(trials) is not int or trials < 0:
        raise ConfigError(f"trials must be a whole number from 0 on, got {trials!r}")
    if type(seed) is not int or not 0 <= seed < 1 << 32:
        raise ConfigError(f"seed must be a whole number from 0 to 2^32 - 1, got {seed!r}")
    if options.get("study") and not options.get("storage"):
        raise ConfigError(
            "study names trials in a storage, and there is none: pass storage too, or leave it out"
        )
    if not trials and options.get("storage"):
        raise ConfigError(
            "storage keeps trials, and trials=0 asks for none: allow some, or leave storage out"
        )


def scenario_of(vram: str | int | None, seq: str | int | None, options: Asked) -> tuple[Scenario, int]:
    """(the question, bytes reserved), from what a caller writes."""
    from planner.quality import profiles

    gpu = options.get("gpu")
    card: Any = gpus.find(gpu) if isinstance(gpu, str) and gpu != "cpu" else gpu
    if vram is None:
        if card is None or card == "cpu":
            raise ConfigError("vram must be given, e.g. vram='8GB', or a card, e.g. gpu='gtx1080'")
        budget = card.usable_bytes
    else:
        budget = parse_bytes(vram, "vram")
        if isinstance(card, gpus.Gpu):
            gpus.check_budget(card, budget, "vram")
    card = card if card is not None else gpus.generic(budget)
    reserve = options.get("reserve", 0)
    reserved = parse_bytes(reserve, "reserve") if str(reserve) != "0" else 0
    if reserved >= budget:
        raise ConfigError(f"reserve must be below the budget of {budget:,} bytes, got {reserved:,}")
    documents = options.get("documents")
    if documents is not None:
        if options.get("objective") == "seq":
            raise ConfigError(
                "objective 'seq' finds the length, which the documents fix; choose 'speed' or 'quality'"
            )
        seq = sum(documents) if seq is None else seq
    aim = options.get("objective") or ("seq" if seq is None else "speed")
    if aim not in get_args(Objective):
        raise ConfigError(f"objective must be one of {', '.join(get_args(Objective))}, got {aim!r}")
    if aim == "seq" and seq is not None:
        raise ConfigError("objective 'seq' finds the length; leave out seq, or choose 'speed' or 'quality'")
    if aim != "seq" and seq is None:
        raise ConfigError(f"objective {aim!r} needs seq, e.g. seq=131072")
    gates = Gates(
        layers=options.get("layers", LAYERS),
        min_mass=options.get("min_mass", MIN_MASS),
        max_seconds=options.get("max_seconds"),
    )
    sizes: dict[str, Any] = {name: options[name] for name in _SIZES if name in options}
    if seq is None:
        least = options.get("queries") or 1
        shortest = Workload(seq=least, **sizes)
        a_token = shortest.floor_at(1) - shortest.floor_at(0)
        room = (budget - reserved) * shortest.gpus - shortest.floor_at(0)
        tokens = min(max(room // a_token, least), MOST_TOKENS)
    else:
        tokens = parse_count(seq, "seq")
        if tokens > MOST_TOKENS:
            raise ConfigError(f"seq must be at most {MOST_TOKENS:,} tokens, got {tokens:,}")
    workload = Workload(seq=tokens, **sizes)
    profile = options.get("profile")
    attends = profile if isinstance(profile, Profile) else profiles.preset(profile or profiles.DEFAULT)
    place: dict[str, Any] = {name: options[name] for name in _PLACE if name in options}
    if card != "cpu" and place.get("threads") is not None:
        raise ConfigError("threads is for gpu='cpu' only; leave it out")
    link, node = options.get("link"), options.get("node")
    network = None
    if workload.gpus == 1:
        refuse_idle_links(link, node)
    else:
        refuse_sharing(AttentionConfig(variant="dense"), workload)
        network = network_of(workload.gpus, card, link, node)
    rates = speed_rates_of(card, workload, place)
    return Scenario(workload, card, budget - reserved, aim, attends, rates, gates, place, network), reserved


def check_backend(scenario: Scenario, space: Space) -> None:
    """ConfigError where the card lacks the one kernel that the space is restricted to."""
    workload, machine = scenario.workload, scenario.machine
    capability = machine.capability if isinstance(machine, Cuda) else None
    backend = space.backend or "auto"
    why = unfit_card(backend, workload.head_dim, workload.itemsize, capability)
    if backend == "flex":
        why = unfit_sizes(workload.head_dim, workload.itemsize, capability) if capability else ON_CUDA_ONLY
    if why:
        name = "the CPU" if isinstance(scenario.card, str) else scenario.card.name
        raise ConfigError(f"backend={backend!r} cannot run on {name}: {why}; use backend='auto'")


def check_features(scenario: Scenario, space: Space) -> None:
    """ConfigError where what the space is restricted to does not take what the workload has."""
    workload = scenario.workload
    backend = space.backend or "auto"
    variants: set[Variant] = {variant_of(kind) for kind in space.kinds}
    if backend == "flex" or not variants:
        variants = {"block_sparse"}
    for variant in sorted(variants):
        parts: dict[str, Any] = {}
        if variant in ("block_sparse", "adaptive"):
            parts["pattern"] = SparsePatternConfig(pattern_type="local_window")
        if variant == "adaptive":
            parts["adaptive"] = AdaptiveConfig(num_heads=workload.heads, head_dim=workload.head_dim)
        if variant == "dilated":
            parts |= {"segment_lengths": (64,), "dilation_rates": (1,)}
        refuse_features(AttentionConfig(variant=variant, backend=backend, **parts), workload)


def better(scenario: Scenario, old: Point | None, new: Point | None) -> Point | None:
    """The better of two; of lengths that count as equal, the longer only if it is faster too."""
    if old is None or new is None:
        return old or new
    by = gain(scenario, old, new)
    if scenario.free_length and by <= SAME:
        return new if by >= 0 and new.seconds < old.seconds else old
    return new if by > 0 else old


def _starts(scenario: Scenario, solved: Solved) -> list[AttentionConfig]:
    """The configs that the search begins with: the grid's optimum, then its best of each shape."""
    _, good = passing(scenario, solved.table)
    ordered = order(scenario, solved.table, np.flatnonzero(good))
    chosen: dict[tuple[object, ...], AttentionConfig] = {}
    if solved.best is not None:
        chosen[family_of(solved.best.config)] = solved.best.config
    for at in ordered[:LOOKED_AT].tolist():
        config = solved.table.config(at, scenario)
        chosen.setdefault(family_of(config), config)
        if len(chosen) == STARTS:
            break
    return list(chosen.values())


def family_of(config: AttentionConfig) -> tuple[object, ...]:
    """Variant, number of branches, pattern, block size and sharding: what makes configs different in kind."""
    pattern = config.pattern
    kind = pattern and (pattern.pattern_type, pattern.block_size)
    return config.variant, len(config.branches), kind, config.sharding


def _answer(
    scenario: Scenario,
    solved: Solved,
    refined: Refined | None,
    best: Point,
    reserved: int,
    seed: int,
    command: str,
) -> Recommendation:
    picks, front = _front(scenario, solved, best)
    grid_best = solved.best
    return Recommendation(
        versions=versions(),
        calibration=rests_on(scenario),
        seed=seed,
        command=command,
        objective=scenario.objective,
        config=best.config,
        workload=scenario.at(best.seq),
        on="cpu" if isinstance(scenario.card, str) else scenario.card.name,
        budget=scenario.budget + reserved,
        reserve=reserved,
        memory=_shared(scenario, best),
        seconds=best.seconds,
        quality=Quality(profile=scenario.profile.name, mass=best.mass, layers=best.layers),
        why=explain(scenario, solved, best),
        alternatives=picks,
        pareto=front,
        search=Search(
            grid=solved.evaluated,
            fit=solved.fit,
            passed=solved.passed,
            trials=refined.trials if refined else 0,
            gain=gain(scenario, grid_best, best) if grid_best else 0.0,
        ),
    )


def _shared(scenario: Scenario, best: Point) -> MemoryEstimate:
    """The estimate of the answer, where GPUs share it with how they do."""
    network = scenario.network
    if network is None:
        return best.memory
    options = {name: scenario.options.get(name) for name in ("calibration", "threads")}
    return shared_over(best.memory, scenario.card, network, options)


def _front(scenario: Scenario, solved: Solved, best: Point) -> tuple[tuple[Pick, ...], tuple[Pick, ...]]:
    """(the three picks, some SHOWN of the Pareto set with the picks and the answer among them), exactly."""
    table, which = solved.table, pareto(scenario, solved)
    points: dict[int, Point | None] = {-1: best}

    def exactly(index: int) -> Point | None:
        if index not in points:
            points[index] = exact(scenario, table, index)
        return points[index]

    while True:
        # The answer is among what is chosen from: trials may have found what the grid has not.
        here = np.append(which, -1)
        chosen = three(
            np.append(table.figures.seconds[which], best.seconds),
            np.append(table.figures.mass[which], best.mass),
            np.append(table.seq[which], best.seq),
        )
        wrong = [int(here[at]) for at in chosen if exactly(int(here[at])) is None]
        if not wrong:
            break
        which = which[~np.isin(which, wrong)]
    spread = np.linspace(0, which.size, min(SHOWN, which.size + 1)).round().astype(int)
    shown = [exactly(int(at)) for at in here[sorted({*spread.tolist(), *chosen, which.size})]]
    different = {point.config: point for point in shown if point}
    roles: tuple[Role, ...] = ("fastest", "balanced", "widest")
    picked = [exactly(int(here[at])) for at in chosen]
    if scenario.network is not None:  # whose seconds arrays know within a factor
        every = list(different.values())
        figures = ([getattr(one, name) for one in every] for name in ("seconds", "mass", "seq"))
        picked = [every[at] for at in three(*map(np.array, figures))]
    picks = [pick(point, role) for point, role in zip(picked, roles, strict=True) if point]
    front = [pick(point) for point in sorted(different.values(), key=lambda point: point.seconds)]
    # Arrays know memory a little less exactly than `exact`, by which some are surpassed after all.
    named = {one.config for one in picks} | {best.config}
    good = named | {one.config for one in unsurpassed(front)}
    return tuple(picks), tuple(one for one in front if one.config in good)


def versions() -> dict[str, str | None]:
    """Versions of the packages that an answer depends on; torch's too, though it is not loaded, because the
    memory model is one of its versions."""
    installed: dict[str, str | None] = {}
    for name in ("attention-planner", "torch", "numpy", "optuna"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


def rests_on(scenario: Scenario) -> str:
    """The calibration or the defaults that memory and seconds are predicted from."""
    calibration = scenario.calibration
    memory = (
        f"memory: {calibration.device} calibrated with torch {calibration.torch} on {calibration.date[:10]}"
        if calibration
        else "memory: not measured on this device"
    )
    return f"{memory}; seconds: {scenario.rates.source}"


def fingerprint(scenario: Scenario, space: Space) -> str:
    """The fingerprint of a question, hexadecimal: a stored study belongs to one question. A measured profile
    counts by its name and shares, so that its file may lie elsewhere, and a dimension that came later counts
    where it is given, so that the studies before it go on."""
    card = scenario.card if isinstance(scenario.card, str) else scenario.card.key
    text = "\n".join(
        [
            scenario.workload.to_json(),
            card,
            str(scenario.budget),
            scenario.objective,
            scenario.profile.model_dump_json(exclude={"source"}),
            repr(scenario.gates),
            space.model_dump_json(exclude={"edges"} if space.edges is None else None),
            repr(sorted(scenario.options.items())),
            *([repr(scenario.network)] if scenario.network is not None else []),
        ]
    )
    return hashlib.sha256(text.encode()).hexdigest()
