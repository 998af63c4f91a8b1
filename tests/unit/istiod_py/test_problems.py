import io

import pytest

from istiod_py.problems import ProblemLog
from mesh.kube.objects import SourceProblem
from mesh.telemetry import log


@pytest.fixture
def lines():
    stream = io.StringIO()
    log.configure(stream=stream)
    yield lambda: stream.getvalue().splitlines()
    log.configure()


def test_a_problem_is_logged_once_when_it_comes_and_once_when_it_goes(lines):
    problems = ProblemLog()
    bad, other = SourceProblem("pods.yaml", 7, "spec.nodeName", "expected text"), SourceProblem("a.yaml", 1, "", "column 2: what is this")
    problems.update([bad, bad])
    problems.update([bad, other])
    assert [line.split("\t")[3] for line in lines()] == ["problem", "problem"]
    assert 'file="pods.yaml" line=7 field="spec.nodeName" message="expected text"' in lines()[0]
    assert problems.describe() == [
        {"file": "a.yaml", "line": 1, "field": "", "message": "column 2: what is this"},
        {"file": "pods.yaml", "line": 7, "field": "spec.nodeName", "message": "expected text"},
    ]
    problems.update([other])
    assert [line.split("\t")[3] for line in lines()][2:] == ["problem.gone"]


def test_a_problem_that_moved_to_another_line_is_no_news_but_is_listed_where_it_is(lines):
    problems = ProblemLog()
    problems.update([SourceProblem("a.yaml", 1, "x", "bad")])
    problems.update([SourceProblem("a.yaml", 9, "x", "bad")])
    assert len(lines()) == 1
    assert problems.current[0].line == 9
