"""Two reports against each other: what is noise, against simulation; what is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.speed_results import CASE, results, trial
from wanx.benchmarks.report.files import dumps, json_safe
from wanx.benchmarks.speed.change import Change, changes, differences
from wanx.benchmarks.speed.results import Results, read_results
from wanx.errors import CorruptInputError, UsageError


def of_steps(*seconds: float, label: str = "one") -> Results:
    rounds = [trial(0, number, [1, value, value]) for number, value in enumerate(seconds)]
    return results(*rounds, labels=(label,))


def step(old: Results, new: Results) -> Change:
    return next(change for change in changes(old, new) if change.metric == "step")


def test_a_change_is_told_from_noise() -> None:
    noisy, slower = of_steps(1.0, 1.1, 0.95), of_steps(1.5, 1.6, 1.45)
    change = step(noisy, slower)
    assert (change.old, change.new, change.growth) == (1.0, 1.5, 0.5)
    assert change.beyond_noise
    assert change.slower_than(0.1)
    assert not change.slower_than(0.6)
    assert not step(slower, noisy).slower_than(0.1)
    assert not step(noisy, of_steps(1.1, 1.0, 1.2)).beyond_noise


@pytest.mark.parametrize("rounds", [(2, 2), (3, 3), (1, 5), (5, 8)])
def test_noise_alone_is_taken_for_a_change_about_once_in_twenty(rounds: tuple[int, int]) -> None:
    draw = np.random.default_rng(1)
    wrong, times = 0, 1500
    for _ in range(times):
        old, new = (np.exp(draw.normal(0, 0.03, count)) for count in rounds)
        wrong += bool(step(of_steps(*old), of_steps(*new)).beyond_noise)
    # Medians scatter somewhat more than means.
    assert 0.03 < wrong / times < 0.10


def test_one_round_each_says_nothing_about_noise_but_fails_over_the_limit() -> None:
    change = step(of_steps(1.0), of_steps(1.2))
    assert (change.noise, change.beyond_noise) == (None, None)
    assert change.slower_than(0.1)
    assert change.to_json()["growth"] == pytest.approx(0.2)


def test_subjects_are_matched_by_label_where_there_are_several() -> None:
    old = results(trial(0, 0, [1, 1]), trial(1, 0, [1, 2]), labels=("a", "b"))
    new = results(trial(0, 0, [1, 4]), trial(1, 0, [1, 1]), labels=("b", "c"))
    assert {change.subject for change in changes(old, new)} == {"b"}
    assert step(old, new).growth == 1.0
    # One each is the same thing before and after, whatever its folder was called.
    assert step(of_steps(1.0, label="before"), of_steps(1.0, label="after")).growth == 0.0


def test_reports_with_nothing_in_common() -> None:
    other = replace(of_steps(1.0), cases=(replace(CASE, steps=50),))
    with pytest.raises(UsageError, match=r"no figure in common.*3 steps.*50 steps"):
        changes(of_steps(1.0), other)


def test_other_machines_are_named() -> None:
    old, new = of_steps(1.0), replace(of_steps(1.0), environment={"cpu": "another"})
    assert differences(old, new) == ["cpu: a processor → another"]
    assert differences(old, old) == []


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = results(trial(0, 0, [1.5, 1 / 3]), problems=("something",))
    path = tmp_path / "report.json"
    path.write_text(dumps(json_safe(written.to_json())))
    assert read_results(path) == written
    assert not read_results(path).complete
    assert math.isclose(read_results(path).trials[0].stages[1].calls[1], 1 / 3, rel_tol=0)


def test_documents_that_are_no_reports(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(UsageError, match=r"No such file.*give a report.json"):
        read_results(path)
    for text in ("{", "[]", '{"kind": "something"}'):
        path.write_text(text)
        with pytest.raises(CorruptInputError, match="wanx bench"):
            read_results(path)
    document = of_steps(1.0).to_json()
    path.write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(UsageError, match="schema version 99, this wanx reads 1; measure again"):
        read_results(path)
    path.write_text(json.dumps(document | {"trials": [{"subject": 0}]}))
    with pytest.raises(CorruptInputError, match=r"trials\.0.*measure again"):
        read_results(path)
