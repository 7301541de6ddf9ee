"""The lines of a tuning result."""

from __future__ import annotations

from planner.report.text.tune import tuned_text


def test_launches_are_a_column_where_any_trial_has_them(tuned):
    table = tuned_text(tuned).rpartition("\n\n")[2]
    assert "launches" not in table
    first, *others = tuned.trials
    counted = tuned.model_copy(update={"trials": (first.model_copy(update={"launches": 1234}), *others)})
    heading, *rows = tuned_text(counted).rpartition("\n\n")[2].splitlines()
    assert heading.split() == ["trial", "time", "predicted", "memory", "launches", "config"]
    end = heading.index("launches") + len("launches")
    assert {row[:end].split()[0]: row[:end].split()[-1] for row in rows} == {
        str(trial.number): "1,234" if trial.number == first.number else "-" for trial in tuned.trials
    }
    assert max(map(len, rows)) <= 80
