"""A progress bar for the sampler."""

from __future__ import annotations

from tqdm.auto import tqdm


class ProgressBar:
    """Shows the sampler's steps, on a terminal or in a notebook: `pipeline(..., progress=ProgressBar())`.

    It appears with the first step, so that an error before it stands alone, and closes after the last.
    """

    def __init__(self, description: str = "sampling") -> None:
        """`description` stands in front of the bar."""
        self._description = description
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        """Shows that `done` of `total` steps are made."""
        if self._bar is None:
            self._bar = tqdm(desc=self._description, total=total, unit="step")
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None
