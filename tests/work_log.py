"""What the lines of attempts tell: which work was done, what was done twice, where an attempt died."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

STAGES = (
    "import_checkpoint",
    "sample_tokens",
    "capture",
    "allocate",
    "branch",
    "select",
    "export",
    "evaluate",
    "report",
)
START, END = "start", "end"  # where a kill falls that hits no stage
STAGE_OF_TITLE = {"import": "import_checkpoint"}  # where the progress is not called like the task
FINISHED = re.compile(r"INFO prefect\.task_runs (?P<stage>\w+) Finished in state Completed\(\)")
# Said after every layer, shard of an import, or lane whose loss was taken, and before the resume point after it.
DONE = re.compile(
    r"DEBUG layerwise\.tasks\.running\.progress \S+ (?P<title>\w+): .*: (?P<unit>\w+) (?P<number>\d+) of \d+ done"
)


@dataclass(frozen=True)
class Log:
    """What the lines of one attempt tell.

    Attributes:
        work: numbers of the pieces of work that it did, by stage and unit ("capture, layer").
        finished: stages whose result it had, whether it was found or made.
        marks: all of that in the order of time, with the seconds since it began.
    """

    work: dict[str, list[int]]
    finished: set[str]
    marks: dict[str, float]

    @classmethod
    def of(cls, lines: Sequence[tuple[float, str]]) -> "Log":
        log = cls({}, set(), {})
        for seconds, line in lines:
            if mark := mark_of(line):
                log.marks[mark] = seconds
                kind, _, number = mark.rpartition(" ")
                if kind:
                    log.work.setdefault(kind, []).append(int(number))
                else:
                    log.finished.add(mark)
        return log


def mark_of(line: str) -> str | None:
    """What a line says is done: "capture, layer 3", or "capture" for all of it; None if it says something else."""
    if (match := FINISHED.match(line)) and match["stage"] in STAGES:  # check_inputs leaves no artifact
        return match["stage"]
    if match := DONE.match(line):
        return f"{STAGE_OF_TITLE.get(match['title'], match['title'])}, {match['unit']} {match['number']}"
    return None


@dataclass
class Run:
    """One search in one store, over all its attempts."""

    store: str
    logs: list[Log] = field(default_factory=list)

    @property
    def frontier(self) -> str:
        """The stage whose result no attempt had so far."""
        done = {stage for log in self.logs for stage in log.finished}
        return next((stage for stage in STAGES if stage not in done), END)

    @property
    def marks(self) -> set[str]:
        """Everything that was finished so far."""
        return {mark for log in self.logs for mark in log.marks}

    @property
    def pieces(self) -> int:
        """Pieces of work done so far, those that were done twice counted twice."""
        return sum(len(numbers) for log in self.logs for numbers in log.work.values())

    @property
    def stage_of_death(self) -> str:
        """The stage that the last attempt was at when it died; ``START`` while it was finding what is there."""
        stages = [*STAGES, END]
        before = stages[: stages.index(self.frontier)]
        return self.frontier if self.logs[-1].finished.issuperset(before) else START

    def repeated_work(self, needed: Mapping[str, list[int]]) -> Iterator[str]:
        """Where more than one piece of work was done again, one was left out, or a finished stage was begun again."""
        for kind, numbers in needed.items():
            reached, finished = 0, False
            for attempt, log in enumerate(self.logs):
                if done := log.work.get(kind):
                    if finished:
                        yield f"{kind}: attempt {attempt} did {done}, but an earlier one had finished the stage"
                    again = reached + 1 - done[0]
                    if again not in (0, 1) or done != list(range(done[0], done[-1] + 1)):
                        yield f"{kind}: attempt {attempt} did {done}, but {reached} was reached before"
                    reached = max(reached, done[-1])
                finished = finished or kind.partition(",")[0] in log.finished
            if reached != numbers[-1]:
                yield f"{kind}: only {reached} of {numbers[-1]} were ever done"
