"""One score, as reports, model cards and the list of packaged models show it."""

from dataclasses import dataclass


@dataclass
class Score:
    """One number with what it takes to measure it again."""

    name: str  # with its protocol in short: scenes-prompts-2000@64/all
    value: float
    protocol: str  # reference, sampler, steps, guidance, seed, weights
    low: float | None = None  # 95% interval
    high: float | None = None
    n: int | None = None
    share: bool = False  # of 1: shown in percent

    @property
    def group(self) -> str:
        return self.name.rpartition("/")[0] or self.name

    @property
    def part(self) -> str:
        return self.name.rpartition("/")[2].replace("_", " ")

    def shown(self) -> str:
        return f"{self.value:.1%}" if self.share else f"{self.value:.4g}"

    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"[{self.low:.1%}, {self.high:.1%}]" if self.share else f"[{self.low:.4g}, {self.high:.4g}]"
