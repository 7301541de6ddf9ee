"""Nothing measured is lost, nothing hangs, however many workers there are and whenever they are killed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 20


def rounds(how, storage, number, cwd, seed=None):
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    script = ROOT / "tests" / "planner" / "search" / "tune_workers.py"
    done = subprocess.run(
        [sys.executable, str(script), how, storage, str(seed), str(number)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["t.journal", "sqlite:///t.db"])
def test_workers_killed_at_any_moment_lose_nothing(storage, tmp_path):
    # By a relative path: what they leave behind must not depend on the folder.
    rounds("kill", storage, ROUNDS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["t.journal", "sqlite:///t.db"])
def test_several_workers_at_once_lose_nothing(storage, tmp_path):
    rounds("together", storage, 2, tmp_path)


# ---- PostgreSQL


@pytest.fixture
def server(tmp_path):
    """A server of PostgreSQL of this test alone: its URL, and what restarts it."""
    pytest.importorskip("psycopg2")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    control = shutil.which("pg_ctl") or next((str(one / "pg_ctl") for one in programs[::-1]), None)
    if control is None:
        pytest.skip("needs PostgreSQL")
    # Not in pytest's folder, which only its owner may enter: the server does not run as root.
    data, as_other = Path(tempfile.mkdtemp()), []
    if os.getuid() == 0:
        as_other = ["runuser", "-u", "postgres", "--"]
        shutil.chown(data, "postgres")
    port = random.SystemRandom().randrange(20_000, 60_000)

    def pg(*command):
        # Into a file: what it starts would keep a pipe open.
        with (tmp_path / "pg_ctl").open("w+") as said:
            done = subprocess.run(
                [*as_other, control, "-D", str(data), *command],
                cwd="/",
                timeout=120,
                check=False,
                stdout=said,
                stderr=said,
            )
            said.seek(0)
            assert done.returncode == 0, said.read()

    options = f"-p {port} -k {data} -c listen_addresses=127.0.0.1 -c fsync=off"

    def start():
        pg("start", "-w", "-l", str(data / "log"), "-o", options)

    def restart(seconds=0.0, how="fast"):
        pg("stop", "-m", how)
        time.sleep(seconds)
        start()

    pg("initdb", "-o", "-A trust -U postgres")
    start()
    try:
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres", restart
    finally:
        pg("stop", "-m", "immediate")
        shutil.rmtree(data)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "together"])
def test_postgresql_loses_nothing(how, server, tmp_path):
    rounds(how, server[0], {"kill": ROUNDS, "together": 2}[how], tmp_path)


@pytest.mark.slow
def test_a_postgresql_that_is_restarted_in_the_midst_is_waited_for(server, tmp_path):
    url, restart = server
    code = (
        "import sys; sys.path.insert(0, sys.argv[2]); import tune_workers as w\n"
        "tell = lambda now: now.last and print(now.measured, flush=True)\n"
        "found = w.planner.tune(**w.ASKED, storage=sys.argv[1], study='s', trials=24, measure=w.measure,\n"
        "                       sampler='random', progress=tell)\n"
        "assert len(found.trials) >= 24; assert len(w.kept(sys.argv[1], 's')) >= 24"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, url, str(Path(__file__).parent)],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as tuner:
        for how, until in (("fast", "5\n"), ("immediate", "12\n")):
            while tuner.stdout.readline() != until:
                assert tuner.poll() is None, tuner.stderr.read()
            restart(2.0, how)
        _, said = tuner.communicate(timeout=300)
    assert tuner.returncode == 0, said
    assert "waiting for the database postgresql+psycopg2://postgres@" in said
    assert "Traceback" not in said
