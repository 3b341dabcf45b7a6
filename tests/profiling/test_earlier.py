"""A profile overwrites only files of an earlier profile."""

from pathlib import Path

import pytest

from minillm.errors import UsageError
from minillm.profiling.page import earlier, report
from minillm.profiling.timing.suites import write_audit


@pytest.mark.parametrize("name", ["index.html", "model.csv", "audit.md"])
def test_a_profile_overwrites_no_file_that_was_put_in_the_place_of_its_own(tmp_path, name):
    about, suites = {"device": "x", "date": "1"}, {"model": [], "audit": []}
    report.write(tmp_path, about, suites)
    write_audit(tmp_path, [])
    report.write(tmp_path, about, suites)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"holds a {name} that minillm did not write"):
        report.write(tmp_path, about, suites)
    assert (tmp_path / name).read_text() == "mine"


def test_a_profile_of_an_earlier_release_can_be_written_to():
    folder = Path(__file__).parents[2] / "benchmarks" / "amd-epyc-2026-11-21"
    earlier.refuse_foreign(folder, earlier.read(folder / earlier.RESULTS)["suites"])
