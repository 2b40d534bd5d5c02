"""Where a run resumes, and what it loses if it ends at once."""

from __future__ import annotations

import pytest

from megaphase.training.resume_point import ResumePoint, loss_sentence

FROM_4 = "The same command resumes from step-00000004"


def test_what_is_told_follows_the_checkpoints():
    told: list[str] = []
    resume_point = ResumePoint(None, 0, told.append)
    beginning = "There is no checkpoint yet: the same command starts from the beginning"
    assert told == [beginning]
    resume_point.note_step(5)
    assert resume_point.loss() == (
        "5 steps are lost, as there is no checkpoint yet; the same command starts from the "
        "beginning"
    )
    resume_point.note_saved("best-00000005")  # weights alone
    resume_point.note_saved("step-00000004")
    assert told == [beginning, FROM_4]
    assert resume_point.sentence() == FROM_4
    assert resume_point.loss() == (
        "1 step since step-00000004 is lost; the same command resumes from step-00000004"
    )


def test_a_run_that_resumes_has_lost_nothing_yet():
    resume_point = ResumePoint("step-00001000", 1000, lambda sentence: None)
    resume_point.note_step(1000)
    assert resume_point.loss().startswith("no step is lost; ")
    resume_point.note_step(2234)
    assert resume_point.loss().startswith("1,234 steps since step-00001000 are lost; ")


@pytest.mark.parametrize(("checkpoint", "then"), [(None, "starts"), ("step-00000009", "resumes")])
def test_no_step_is_lost_right_after_a_save(checkpoint, then):
    assert loss_sentence(checkpoint, 0).startswith(f"no step is lost; the same command {then} from")
