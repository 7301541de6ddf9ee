"""The command line: options become the right call, data goes to stdout, errors are one line and a code."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from attention import AdaptiveConfig, AttentionConfig, SparsePatternConfig, UnavailableError
from planner.api import estimate
from planner.cli.main import app
from planner.gpus import generic
from planner.measuring import records
from planner.measuring.measure import Environment, Measurement
from planner.memory.estimate import MemoryEstimate, max_sequence
from planner.report.text.formats import as_yaml
from planner.workload import Workload

ROOT = Path(__file__).resolve().parents[3]
SMALL = ROOT / "docs" / "examples" / "small.json"
COMMANDS = sorted(typer.main.get_command(app).commands)
# The module: `planner.measure` is the function.
measuring = importlib.import_module("planner.measuring.measure")
DENSE = ["measure", "--variant", "dense", "--seq", "16"]
HERE = Environment(python="3.11", system="Linux", settings={}, date="2026-01-01T00:00:00+00:00")


def planner(*arguments, **env):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80", **env}, prog_name="planner")


def refused(result) -> str:
    """The one line on stderr that a wrong request gets."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("planner: error: ")
    return line.removeprefix("planner: error: ")


@pytest.fixture
def calls(monkeypatch):
    """Measuring answers at once; the list gets its (config, workload, device, options)."""
    made = []

    def measure(config, workload, device, *, kind="ok", **given):
        made.append((config, workload, device, given))
        figures = {"seconds": 0.5, "allocated": 4096} if kind == "ok" else {"message": f"so it is: {kind}"}
        return Measurement(
            config=config,
            workload=workload,
            device=device,
            kind=kind,
            runs=given["runs"],
            environment=HERE,
            **figures,
        )

    monkeypatch.setattr(measuring, "measure", measure)
    return made


def ends(monkeypatch, kind):
    """Measuring ends in `kind`."""
    answer = measuring.measure
    monkeypatch.setattr(measuring, "measure", lambda *what, **given: answer(*what, kind=kind, **given))


# ---- help


def test_the_commands_are_these():
    assert {"gpus", "measure"} <= set(COMMANDS)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_has_an_example_that_works(command, flag, calls):
    result = planner(*command, flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    _, _, after = result.stdout.partition("Example:\n")
    example = shlex.split(after)
    assert example[: len(command) + 1] == ["planner", *command]
    # A calibration takes minutes; tests/planner/fitting/test_calibrate.py runs a small one.
    # Tuning runs five configs; tests/planner/search/test_tune.py runs them small.
    # A study takes seconds; tests/studies runs them small.
    # A report needs a file; tests/planner/report/page/test_page.py has some.
    # A dry run needs a CUDA build of torch; tests/planner/programs/test_dry_run.py has one where there is.
    asks = ["--help"] if command in (["calibrate"], ["tune"], ["study"], ["report"]) else []
    if command == ["dry-run"]:
        example = [*example[: example.index("--")], "--help"]
    assert planner(*example[1:], *asks).exit_code == 0


def test_help_says_the_defaults_of_the_values_that_options_fill():
    text = " ".join(planner("measure", "--help").stdout.split())
    pattern, workload = SparsePatternConfig(), Workload(seq=1)
    for option, default in [
        ("--batch", workload.batch),
        ("--heads", workload.heads),
        ("--head-dim", workload.head_dim),
        ("--dtype", workload.dtype),
        ("--mode", workload.mode),
        ("--pattern", pattern.pattern_type),
        ("--block-size", pattern.block_size),
        ("--window", pattern.local_window_size),
        ("--global-tokens", pattern.global_tokens),
        ("--edges", pattern.edges),
        ("--sparsity", pattern.sparsity_ratio),
    ]:
        assert f"[default: {default}]" in text.partition(f" {option} ")[2].partition(" --")[0]


# ---- options


@pytest.mark.parametrize(
    "given, config",
    [
        ("--variant dense", AttentionConfig(variant="dense")),
        (
            "--variant dilated --segments 2048,4K --rates 1,2",
            AttentionConfig(variant="dilated", segment_lengths=(2048, 4096), dilation_rates=(1, 2)),
        ),
        (
            "--variant block_sparse --pattern global_local --block-size 64 --window 300 --global-tokens 128 "
            "--edges token",
            AttentionConfig(
                variant="block_sparse",
                pattern=SparsePatternConfig(
                    pattern_type="global_local",
                    block_size=64,
                    local_window_size=300,
                    global_tokens=128,
                    edges="token",
                ),
            ),
        ),
        (
            "--variant block_sparse --sparsity 0.01 --segments 2048 --rates 3",
            AttentionConfig(
                variant="block_sparse",
                pattern=SparsePatternConfig(sparsity_ratio=0.01),
                segment_lengths=(2048,),
                dilation_rates=(3,),
            ),
        ),
        (
            "--variant adaptive --heads 4 --head-dim 32",
            AttentionConfig(
                variant="adaptive",
                pattern=SparsePatternConfig(),
                adaptive=AdaptiveConfig(num_heads=4, head_dim=32),
            ),
        ),
    ],
)
def test_options_describe_a_config(given, config, calls):
    result = planner("measure", "--seq", "16", *given.split())
    assert (result.exit_code, result.stderr) == (0, "")
    assert calls[0][0] == config


def test_options_describe_a_workload_and_a_run(calls):
    given = (
        "--seq 128K --batch 2 --heads 12 --kv-heads 4 --head-dim 32 --dtype bfloat16 --mode training "
        "--causal --weights --device cuda --timeout 7.5 --runs 5 --cap 8GB"
    )
    assert planner("measure", "--variant", "dense", *given.split()).exit_code == 0
    workload = Workload(
        seq=131_072,
        batch=2,
        heads=12,
        kv_heads=4,
        head_dim=32,
        dtype="bfloat16",
        mode="training",
        causal=True,
        weights=True,
    )
    assert calls[0][1:] == (workload, "cuda", {"timeout": 7.5, "runs": 5, "cap_bytes": 8 * 10**9})


@pytest.mark.parametrize(
    "given, fields",
    [
        ("--seq 8K --queries 1", {"seq": 8192, "queries": 1}),
        ("--documents 1K,512x2 --sinks", {"seq": 2048, "documents": (1024, 512, 512), "sinks": True}),
        ("--seq 12 --queries 5 --documents 8,4", {"seq": 12, "queries": 5, "documents": (8, 4)}),
    ],
)
def test_options_describe_queries_documents_and_sinks(given, fields, calls):
    assert planner("measure", "--variant", "dense", *given.split()).exit_code == 0
    assert calls[0][1] == Workload(**fields)


def test_sizes_can_be_binary(calls):
    planner(*DENSE, "--cap", "8GiB")
    assert calls[0][3]["cap_bytes"] == 8 << 30


def test_a_file_has_the_whole_config(tmp_path, calls):
    config = AttentionConfig(variant="dilated", segment_lengths=[8], dilation_rates=[1], pool="off")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert planner("measure", "--config", str(path), "--seq", "16").exit_code == 0
    assert calls[0][0] == config


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "is no JSON"),
        ("[]", "expected a JSON object"),
        ("\x00\xff", "is no JSON"),
        ('{"variant": "dense", "schema_version": 2}', "schema_version"),
        ('{"variant": "sparse"}', "variant: Input should be"),
        ('{"variant": "dense",\n "typo": 1}', "typo: no such option"),
    ],
)
def test_a_file_that_is_no_config_is_refused(text, said, tmp_path, calls):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    line = refused(planner("measure", "--config", str(path), "--seq", "16"))
    assert said in line
    assert line.startswith(f"--config {path}")
    assert not calls


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path, why in [(tmp_path / "none.json", "No such file"), (tmp_path, "directory")]:
        line = refused(planner("measure", "--config", str(path), "--seq", "16"))
        assert line.startswith(f"--config {path} cannot be read: ")
        assert why in line


@pytest.mark.parametrize(
    "given, said",
    [
        ("--seq 16", "pass e.g. --variant dense, or --config FILE"),
        (f"--seq 16 --config {SMALL} --variant dense", "--config has the whole config"),
        (f"--seq 16 --config {SMALL} --rates 1", "--config has the whole config"),
        ("--seq 16x --variant dense", "--seq '16x' is not understood"),
        ("--seq 0 --variant dense", "--seq must be above 0"),
        ("--seq 16 --variant dense --batch 0", "batch: Input should be greater"),
        ("--seq 16 --variant dense --kv-heads 3", "kv_heads must divide heads"),
        ("--seq 16 --variant dense --cap 8XB", "--cap '8XB' is not understood"),
        ("--seq 16 --variant dense --pattern local_window", "takes no pattern"),
        ("--seq 16 --variant dilated --segments 8 --rates 1,2", "pair up, got 1 and 2"),
        ("--seq 16 --variant dilated --segments 8,, --rates 1", "--segments '' is not understood"),
        ("--seq 16 --variant block_sparse --sparsity 1.5", "sparsity_ratio: Input should be less"),
        ("--seq 16 --variant dense --runs 0", "runs must be a whole number"),
        ("--seq 16 --variant dense --queries 17", "at most seq=16 of them, got queries=17"),
        ("--seq 16 --variant dense --documents 8,4", "they have 12 tokens in all, seq=16"),
        ("--seq 16 --variant dense --documents 16x", "--documents '' is not understood"),
        ("--seq 16 --variant dense --documents 1x99999999", "at most 65,536 documents"),
    ],
)
def test_a_wrong_request_is_one_line(given, said):
    assert said in refused(planner("measure", *given.split()))


@pytest.mark.parametrize(
    "given", ["", "--seq 16 --variant sparse", "--seq 16 --typo", "--seq 16 --batch two"]
)
def test_misuse_is_no_traceback(given):
    result = planner("measure", *given.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert "rror: " in result.stderr
    assert "Traceback" not in result.stderr


def test_what_has_no_effect_is_said(calls):
    given = "--seq 16 --variant block_sparse --pattern local_window --sparsity 0.5"
    result = planner("measure", *given.split())
    assert result.stderr == "planner: note: without effect here: sparsity_ratio\n"
    assert result.exit_code == 0


# ---- measure


def test_formats_of_a_measurement(calls):
    table, js, yaml = (planner(*DENSE, "--format", name) for name in ("table", "json", "yaml"))
    found = Measurement.from_json(js.stdout)
    assert (found.seconds, found.workload.seq, found.config.variant) == (0.5, 16, "dense")
    assert yaml.stdout == as_yaml(json.loads(js.stdout)) + "\n"
    assert "0.5 s" in table.stdout


@pytest.mark.parametrize("kind, code", [("ok", 0), ("oom", 0), ("timeout", 0), ("crash", 1), ("error", 2)])
def test_whatever_happened_is_printed_and_kept(kind, code, tmp_path, calls, monkeypatch):
    ends(monkeypatch, kind)
    file = tmp_path / "records"
    result = planner(*DENSE, "--format", "json", "--append", str(file))
    assert result.exit_code == code
    assert result.stderr == f"planner: the record was added to {file}\n"
    assert records.read(file) == [Measurement.from_json(result.stdout)]
    assert records.read(file)[0].kind == kind
    shown = planner(*DENSE)
    assert shown.exit_code == code
    assert kind == "ok" or f"so it is: {kind}" in shown.stdout


def test_a_record_that_cannot_be_kept_is_printed_all_the_same(tmp_path, calls):
    result = planner(*DENSE, "--format", "json", "--append", str(tmp_path))
    assert Measurement.from_json(result.stdout).kind == "ok"
    assert result.exit_code == 2
    assert "the record was not kept" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_no_wrong_request(calls):
    result = planner(*DENSE, "--format", "json", "--append", "/dev/full")
    assert Measurement.from_json(result.stdout).kind == "ok"
    assert result.exit_code == 1
    assert "the record was not kept: writing /dev/full failed (No space left" in result.stderr


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UnavailableError("no\n card"), 2, "planner: error: no card\n"),
        (KeyboardInterrupt(), 130, "planner: interrupted\n"),
    ],
)
def test_errors_and_interrupts_end_in_a_line_and_a_code(error, code, said, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(measuring, "measure", fail)
    result = planner(*DENSE)
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", said)


def test_progress_is_shown_on_terminals_only_and_never_in_the_data(calls):
    assert planner(*DENSE, "--format", "json").stderr == ""
    shown = planner(*DENSE, "--format", "json", FORCE_COLOR="1", TERM="xterm")
    assert "measuring dense at 16 tokens on cpu" in shown.stderr
    assert Measurement.from_json(shown.stdout).kind == "ok"


# ---- gpus


@pytest.mark.parametrize(
    "arguments",
    [
        ("recommend", "--gpu", "MI300X", "--seq", "1K"),
        ("estimate", "--device", "MI300X", "--variant", "dense", "--seq", "1K"),
        ("max-seq", "--vram", "8GB", "--device", "MI300X", "--variant", "dense"),
        ("gpus", "--name", "MI300X"),
    ],
)
def test_a_card_that_is_not_nvidias_is_refused_by_name(arguments):
    assert refused(planner(*arguments)).startswith("'MI300X' is AMD's and not an NVIDIA card")


def test_gpus_lists_all_or_those_of_a_name():
    every = json.loads(planner("gpus", "--format", "json").stdout)
    some = json.loads(planner("gpus", "--name", "RTX 40", "--format", "json").stdout)
    assert 1 < len(some) < len(every)
    assert [card for card in every if "RTX 40" in card["name"]] == some
    table = planner("gpus", "--name", "RTX 40")
    assert all(card["key"] in table.stdout for card in some)
    assert all(len(line) <= 80 for line in table.stdout.splitlines())


def test_one_card_is_shown_with_its_sources():
    (card,) = json.loads(planner("gpus", "--name", "rtx 4060", "--format", "json").stdout)
    assert card["key"] == "rtx4060"
    shown = " ".join(planner("gpus", "--name", "rtx 4060").stdout.split())
    assert card["source"] in shown
    assert card["usable_source"] in shown
    assert planner("gpus", "--name", "rtx 4060", "--format", "yaml").stdout == as_yaml([card]) + "\n"


def test_a_name_that_no_card_has_is_refused():
    assert "nearest are" in refused(planner("gpus", "--name", "voodoo2"))


# ---- predictions

WINDOW = ["--variant", "block_sparse", "--pattern", "local_window", "--block-size", "64"]


def test_an_estimate_is_what_the_library_says():
    asked = ["--seq", "8K", "--batch", "2", "--mode", "training", "--causal"]
    result = planner("estimate", *WINDOW, *asked, "--device", "gtx1080", "--format", "json")
    config = AttentionConfig(
        variant="block_sparse", pattern=SparsePatternConfig(pattern_type="local_window", block_size=64)
    )
    workload = Workload(seq=8192, batch=2, mode="training", causal=True)
    assert (result.exit_code, result.stderr) == (0, "")
    assert MemoryEstimate.from_json(result.stdout) == estimate(config, workload, "gtx1080")


@pytest.mark.parametrize(
    "given, device, options",
    [
        ("", "cpu", {}),
        ("--threads 3", "cpu", {"threads": 3}),
        ("--vram 8GB", generic(8 * 10**9), {}),
        ("--device 'rtx 4060' --display desktop", "rtx4060", {"display": "desktop"}),
        (
            "--device rtx4060 --others 1GB --context 300MB",
            "rtx4060",
            {"others_bytes": 10**9, "context_bytes": 3 * 10**8},
        ),
        (
            "--device rtx4060 --allocator expandable_segments:True",
            "rtx4060",
            {"allocator": "expandable_segments:True"},
        ),
    ],
)
def test_where_an_estimate_is_for(given, device, options):
    result = planner("estimate", *DENSE[1:], *shlex.split(given), "--format", "json")
    found = estimate(AttentionConfig(variant="dense"), Workload(seq=16), device, **options)
    assert MemoryEstimate.from_json(result.stdout) == found


def test_an_estimate_in_words():
    lines = planner("estimate", *WINDOW, "--seq", "8K", "--device", "gtx1080", "--lines").stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0] == "block_sparse, local_window, on NVIDIA GeForce GTX 1080"
    assert any(line.startswith("budget       8.49 GB") for line in lines)
    assert not any("cuBLAS workspace" in line for line in lines)  # no product runs through it
    plain = planner("estimate", *DENSE[1:], "--vram", "700MB").stdout
    assert "budget       700.00 MB" in plain
    adaptive = ("--variant", "adaptive", "--seq", "8K", "--device", "gtx1080", "--lines")
    assert "cuBLAS workspace" in planner("estimate", *adaptive).stdout


def test_an_estimate_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    result = planner("estimate", *DENSE[1:], "--plot", str(tmp_path / "a.svg"))
    assert result.exit_code == 0
    assert "a.svg" in result.stderr.replace("\n", "")
    assert (tmp_path / "a.svg").exists()


def test_the_longest_sequence_is_what_the_library_says():
    result = planner("max-seq", "--vram", "8GB", *WINDOW, "--format", "json")
    found = json.loads(result.stdout)
    config = AttentionConfig.model_validate(found["fits"]["config"])
    assert (result.exit_code, result.stderr) == (0, "")
    assert found["seq"] == max_sequence(config, Workload(seq=1), "8GB")
    assert found["fits"]["upper"] <= found["budget"] == 8 * 10**9 < found["beyond"]["upper"]
    assert f"longest      {found['seq']:,} tokens" in planner("max-seq", "--vram", "8GB", *WINDOW).stdout


def test_where_nothing_fits_the_exit_code_is_3_and_says_what_would():
    given = ["--vram", "10MB", "--device", "cpu", "--threads", "2", "--variant", "dense", "--batch", "200"]
    result = planner("max-seq", *given)
    assert result.exit_code == 3
    (line,) = result.stderr.splitlines()
    assert line.startswith("planner: nothing fits 10MB; what would: --batch ")
    data = json.loads(planner("max-seq", *given, "--format", "json").stdout)
    assert (data["seq"], data["fits"]) == (0, None)
    batch, vram = (option.split()[:2] for option in data["relaxations"])
    assert planner("max-seq", *given, *batch).exit_code == 0
    assert planner("max-seq", *given, *vram).exit_code == 0


def test_the_longest_sequence_has_all_tokens_that_ask():
    few = ["--variant", "dense", "--vram", "1GB", "--queries", "5000", "--format", "json"]
    found = json.loads(planner("max-seq", *few).stdout)
    assert found["seq"] > 5000
    none = json.loads(planner("max-seq", *few, "--vram", "1MB").stdout)
    assert none["beyond"]["workload"]["seq"] == 5056


def test_documents_fix_the_length(tmp_path):
    path = tmp_path / "answer.json"
    path.write_text(
        planner("estimate", "--variant", "dense", "--documents", "64,36", "--format", "json").stdout
    )
    assert json.loads(path.read_text())["workload"]["seq"] == 100
    assert "which fix the length" in refused(planner("max-seq", "--vram", "1GB", "--config", str(path)))
    longer = planner("estimate", "--config", str(path), "--documents", "64x2", "--format", "json")
    assert json.loads(longer.stdout)["workload"]["documents"] == [64, 64]


def test_configs_and_estimates_are_compared(tmp_path):
    for name, device in (("a", "gtx1080"), ("b", "rtx4060")):
        saved = planner("estimate", *WINDOW, "--seq", "8K", "--device", device, "--format", "json")
        (tmp_path / f"{name}.json").write_text(saved.stdout)
    config = tmp_path / "c.json"
    config.write_text(AttentionConfig(variant="dense").to_json())
    a, b = (str(tmp_path / f"{name}.json") for name in "ab")
    data = json.loads(planner("compare", a, b, "--format", "json").stdout)
    assert data["asked"] == {"device": {"a": "NVIDIA GeForce GTX 1080", "b": "NVIDIA GeForce RTX 4060"}}
    text = planner("compare", a, str(config), "--seq", "8K", "--device", "gtx1080").stdout
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "variant: block_sparse -> dense" in text
    assert "seq" not in text.partition("component")[0]
    assert "a config needs --seq" in refused(planner("compare", a, str(config)))


@pytest.mark.parametrize(
    "given, said",
    [
        ("estimate --variant dense --seq 16 --device voodoo2", "nearest are"),
        ("estimate --variant dense --seq 16 --device gtx1080 --dtype bfloat16", "compute capability 8.0"),
        ("estimate --variant dense --seq 16 --vram much", "--vram 'much' is not understood"),
        ("estimate --variant dense --seq 16 --others 1GB", "--others: for a GPU only"),
        ("estimate --variant dense --seq 16 --display desktop", "--display: for a GPU only"),
        ("estimate --variant dense --seq 16 --vram 8GB --threads 2", "--threads is for a CPU only"),
        ("estimate --variant dense --seq 16 --calibration none.json", "none.json cannot be read"),
        ("estimate --variant dense --seq 16 --plot a.txt", "must end in .png or .svg"),
        ("estimate --variant dense --seq 16 --device gtx1080 --allocator x:1", "x"),
        ("max-seq --variant dense --vram 0", "--vram must be above 0"),
        ("recommend --vram 8GB --documents 64,64 --objective seq", "which the documents fix"),
        ("compare none.json none.json --seq 16", "none.json cannot be read"),
    ],
)
def test_predictions_that_cannot_be_made_are_refused(given, said):
    assert said in refused(planner(*given.split()))


def test_predictions_import_neither_torch_nor_numpy_nor_rich():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = sys.modules['rich'] = None\n"
        "from planner.cli.main import main\n"
        "for line in ('estimate --variant dense --seq 16 --vram 8GB --mode training', "
        "'max-seq --variant dense --vram 8GB', "
        "'compare docs/examples/small.json docs/examples/large.json --seq 16K'):\n"
        "    sys.argv = ['planner', *line.split()]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


# ---- processes


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_and_gpus_import_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from planner.cli.main import main\n"
        "for sys.argv in (['planner', '--help'], ['planner', 'measure', '--help'], ['planner', 'gpus']):\n"
        "    try: main()\n"
        "    except SystemExit as end: assert end.code == 0, end.code\n"
        "    else: raise AssertionError('main returned')\n"
        "assert 'numpy' not in sys.modules\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "rtx4060" in done.stdout


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        ("gpus --name h200 --format json", 0, ""),
        ("gpus --name voodoo2", 2, "planner: error: GPU 'voodoo2' is not known"),
        ("nonsense", 2, "No such command"),
    ],
)
def test_exit_codes_of_the_process(arguments, code, said):
    done = run("-m", "planner", *arguments.split())
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert (done.stdout == "") == (code != 0)
    assert code or json.loads(done.stdout)[0]["key"] == "h200"


def test_a_real_measurement():
    given = "--heads 1 --head-dim 8 --dtype float32 --format json"
    done = run("-m", "planner", *DENSE, *given.split())
    assert (done.returncode, done.stderr) == (0, "")
    found = Measurement.from_json(done.stdout)
    assert found.kind == "ok"
    assert found.allocated > found.workload.floor


def test_the_command_is_installed_as_planner():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = project["scripts"]["planner"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))


# ---- what has no effect, what cannot be written


@pytest.mark.parametrize(
    "line, said",
    [
        ("recommend --vram 8GB --seq 8K --study a", "study names trials in a storage, and there is none"),
        ("recommend --vram 8GB --seq 8K --trials 0 --storage a.journal", "trials=0 asks for none"),
        (
            "recommend --vram 8GB --seq 8K --trials 0 --seed 1",
            "--seed: for trials only, and --trials 0 asks for none",
        ),
        ("recommend --vram 8GB --seq 8K --verify --format py", "--verify says how the picks ran"),
        ("recommend --gpu gtx1080 --vram 16GB --seq 8K", "GTX 1080 has 8,491,368,448 that can be used"),
        ("estimate --variant dense --seq 8K --device gtx1080 --vram 16GB", "--vram is 16,000,000,000 bytes"),
        ("recommend --vram 8GB --seq 8K --max-seconds inf", "max_seconds must be a number above 0"),
        ("recommend --vram 8GB --seq 8K --max-seconds nan", "max_seconds must be a number above 0"),
        ("recommend --vram 8GB --seq 8K --block-size 63.5", "--block-size must be a whole number"),
        ("estimate --variant dilated --seq 8 --segments 8 --rates 1.9", "--rates must be a whole number"),
        ("study --list all", "NAME: --list runs nothing"),
        ("study --list --quick", "--quick: --list runs nothing"),
    ],
)
def test_an_option_without_effect_is_refused(line, said):
    assert said in refused(planner(*line.split()))


def test_sizes_beside_two_estimates_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(estimate(AttentionConfig(variant="dense"), Workload(seq=16)).to_json())
    assert planner("compare", str(path), str(path)).exit_code == 0
    line = refused(planner("compare", str(path), str(path), "--seq", "8K", "--head-dim", "8"))
    assert line == "--head-dim, --seq: for configs, and both files have figures of their own; remove them"
    assert planner("compare", str(path), str(SMALL), "--seq", "8K").exit_code == 0


def test_show_says_which_sizes_it_does_not_read(tmp_path):
    result = planner("show", str(SMALL), "--head-dim", "8")
    assert (result.exit_code, "note: without effect here: --head-dim" in result.stderr) == (0, True)


def test_an_estimate_as_data_says_whether_it_fits():
    for size, said in (("1KB", "above"), ("8GB", "within")):
        result = planner(
            *f"estimate --variant dense --seq 64 --device cpu --vram {size} --format json".split()
        )
        assert result.stderr == f"planner: the upper bound is {said} --vram\n"


def test_a_sampler_whose_package_is_missing_is_refused_before_the_work(monkeypatch):
    from planner.search import recommend as recommendation
    from planner.search import samplers

    monkeypatch.setattr(samplers, "find_spec", lambda name: None)
    monkeypatch.setattr(recommendation, "enumerate_grid", lambda *_: pytest.fail("worked first"))
    assert "needs cmaes" in refused(
        planner("recommend", "--vram", "8GB", "--seq", "8K", "--sampler", "cmaes")
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("line", ["gpus", "gpus --format json", "--help"])
def test_a_full_standard_output_is_one_line_and_exit_code_1(line, unbuffered):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "planner", *line.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
    said = "planner: error: standard output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_reader_that_has_had_enough_is_no_error():
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-m", "planner", "gpus"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_config_from_a_pipe_is_read_once():
    done = subprocess.run(
        [sys.executable, "-m", "planner", "compare", "/dev/stdin", "/dev/stdin", "--seq", "1K"],
        input=SMALL.read_bytes(),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, b"")
