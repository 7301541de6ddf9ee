"""Options of several GPUs: they become the right call, and are refused where they would have no effect."""

import json

import pytest
from typer.testing import CliRunner

import planner
from attention import AttentionConfig
from planner.answers.shared import SharedEstimate
from planner.cli.main import app
from planner.workload import Workload

DENSE = ["--variant", "dense"]


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"}, prog_name="planner")


def refused(result):
    """The one line on stderr that a wrong request gets."""
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("planner: error: ")


def test_options_describe_gpus_and_links():
    links = ["--gpus", "16", "--link", "nvlink4,hdr", "--node", "8"]
    result = run("estimate", *DENSE, "--seq", "8K", "--device", "h100-sxm", *links, "--format", "json")
    estimate = SharedEstimate.from_json(result.stdout)
    assert estimate.workload == Workload(seq=8192, gpus=16)
    assert (estimate.sharing.link, estimate.sharing.node) == ("nvlink4,hdr", 8)


def test_a_file_may_say_how_many_gpus(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(planner.estimate(AttentionConfig(variant="dense"), Workload(seq=4096, gpus=4)).to_json())
    again = run("estimate", "--config", str(path), "--format", "json")
    assert json.loads(again.stdout) == json.loads(path.read_text())
    two = json.loads(run("estimate", "--config", str(path), "--gpus", "2", "--format", "json").stdout)
    assert two["workload"]["gpus"] == 2
    assert "a measurement is of one device" in refused(run("measure", "--config", str(path)))


def test_one_gpu_is_answered_as_without_the_option():
    line = ["estimate", *DENSE, "--seq", "4K", "--vram", "8GB"]
    for more in ([], ["--format", "json"]):
        assert run(*line, "--gpus", "1", *more).stdout == run(*line, *more).stdout


def test_the_longest_sequence_of_several_gpus_is_longer():
    line = ["max-seq", *DENSE, "--vram", "16GB", "--format", "json"]
    one, many = json.loads(run(*line).stdout), json.loads(run(*line, "--gpus", "4").stdout)
    assert many["seq"] > one["seq"]
    assert "sharing" not in one["fits"]
    assert many["fits"]["sharing"]["ring"] == 4
    assert "traffic" in run(*line[:-2], "--gpus", "4").stdout


def test_configs_on_several_gpus_are_compared(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(AttentionConfig(variant="dense").to_json())
    line = ["compare", str(path), str(path), "--seq", "8K", "--gpus", "4", "--device", "rtx4090"]
    assert "sent by a GPU" in run(*line).stdout
    estimate = tmp_path / "b.json"
    estimate.write_text(run("estimate", *DENSE, "--seq", "8K", "--format", "json").stdout)
    line = ["compare", str(estimate), str(estimate), "--gpus", "4", "--link", "pcie4"]
    assert refused(run(*line)).startswith("--gpus, --link: for configs")


@pytest.mark.parametrize(
    "line, why",
    [
        ("estimate --variant dense --seq 16 --link nvlink4", "--link: for several GPUs; add --gpus"),
        ("estimate --variant dense --seq 16 --gpus 1 --node 2", "--node: for several GPUs"),
        ("max-seq --variant dense --vram 1GB --link nvlink4", "--link: for several GPUs"),
        ("estimate --variant dense --seq 16 --gpus 0", "gpus: Input should be greater than or equal to 1"),
        (
            "estimate --variant dense --seq 16 --gpus 8 --link foo",
            "link 'foo' is not known; there are nvlink2",
        ),
        (
            "estimate --variant dense --seq 16 --gpus 8 --link nvlink4,ndr --node 3",
            "node must divide the GPUs",
        ),
        ("estimate --variant dense --seq 16 --gpus 8 --link nvlink4,ndr", "give the GPUs of a node too"),
        ("estimate --variant adaptive --seq 1K --gpus 8 --kv-heads 4", "use ring_size=4"),
        ("estimate --variant dense --seq 1K --gpus 8 --queries 1", "for one GPU"),
    ],
)
def test_a_wrong_request_is_one_line(line, why):
    assert why in refused(run(*line.split()))


@pytest.mark.parametrize("command", ["measure", "tune", "show"])
def test_commands_of_one_device_have_no_such_options(command):
    assert "--link" not in run(command, "--help").stdout


def test_who_holds_and_sends_what_is_shown_in_80_columns():
    line = "show --variant block_sparse --pattern local_window --window 4096 --seq 128K --causal --gpus 8"
    shown = run(*line.split())
    assert shown.exit_code == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    (second,) = (one for one in lines if one.startswith("   1  16,384 to 32,767"))
    assert second.split()[-5:] == ["8.4", "MB", "8.4", "MB", "2"]
    data = json.loads(run(*line.split(), "--format", "json").stdout)
    halo = 2 * 4096 * 8 * 64 * 2
    assert data["ranks"][1]["forward"] == {"0": [0, halo], "2": [halo, 0]}
    assert data["ranks"][7]["holds"] == [[114_688, 131_072]]


def test_more_ranks_than_are_drawn_are_refused():
    assert "at most 64 GPUs are drawn" in refused(run("show", "--variant", "dense", "--gpus", "128"))
