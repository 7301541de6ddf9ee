"""The page of an answer. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from attention.errors import ConfigError
from planner.answers.read import Answer, read_answer
from planner.answers.recommendation import Recommendation

MAXIMUM_BYTES: Final = 5 * 10**6


def answer_page(file: Path | None, storage: str | None, study: str | None) -> str:
    """HTML of the answer in a file, or of the trials so far of a study in a storage."""
    if file is not None:
        return page_of(read_answer(file))
    from planner.search.tune import stored

    return page_of(Answer(stored(storage or "", study or "")))


def page_of(answer: Answer) -> str:
    """HTML of an answer; ConfigError if it would take more than MAXIMUM_BYTES."""
    if isinstance(answer.found, Recommendation):
        from planner.report.page.recommend import recommend_page

        text = recommend_page(answer.found, answer.verified)
    else:
        from planner.report.page.tune import tune_page

        text = tune_page(answer.found)
    size = len(text.encode())
    if size > MAXIMUM_BYTES:
        raise ConfigError(
            f"the page would take {size:,} bytes, more than {MAXIMUM_BYTES:,}: its texts are too long"
        )
    return text
