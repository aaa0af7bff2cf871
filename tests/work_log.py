"""Analysis of the log lines of attempts: finished work, repeated work, and the stage of a kill."""

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
    "evaluate",  # in the pass of the export, which ends a little later
    "export",
    "report",
)
RECOVERING_STAGES = (*STAGES[:-3], "recover", *STAGES[-3:])
START, END = "start", "end"  # names for kills before and after all stages
STAGE_OF_TITLE = {"import": "import_checkpoint"}  # titles of progress that differ from the task's name
FINISHED = re.compile(r"INFO prefect\.task_runs (?P<stage>\w+) Finished in state Completed\(\)")
# Logged after every layer, shard of an import, or loss of a lane, and before the following resume point.
DONE = re.compile(
    r"DEBUG layerwise\.tasks\.running\.progress \S+ (?P<title>\w+): (?P<about>.*): (?P<unit>\w+) (?P<number>\d+) of \d+ done"
)


@dataclass(frozen=True)
class Log:
    """Work of one attempt, read from its log lines.

    Attributes:
        work: numbers of the pieces of work, by stage and unit ("capture, layer").
        finished: stages whose result was built or found.
        marks: marks of all of these in chronological order, with the seconds since the start.
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
    """Return the work that a line reports as done: "capture, layer 3", "capture" for a whole stage, or None."""
    if (match := FINISHED.match(line)) and match[
        "stage"
    ] in RECOVERING_STAGES:  # check_inputs leaves no artifact
        return match["stage"]
    if match := DONE.match(line):
        stage = STAGE_OF_TITLE.get(match["title"], match["title"])
        # Every plan is recovered in a pass of its own.
        name = f"{stage} {match['about']}" if stage == "recover" else stage
        return f"{name}, {match['unit']} {match['number']}"
    return None


def stage_of(mark: str) -> str:
    """Return the stage of a mark or of a kind of work."""
    return re.split("[ ,]", mark)[0]


@dataclass
class Run:
    """All attempts of one search in one store."""

    store: str
    logs: list[Log] = field(default_factory=list)
    recovers: bool = False

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages of the search, in order."""
        return RECOVERING_STAGES if self.recovers else STAGES

    @property
    def frontier(self) -> str:
        """Return the first unfinished stage."""
        done = {stage for log in self.logs for stage in log.finished}
        return next((stage for stage in self.stages if stage not in done), END)

    @property
    def marks(self) -> set[str]:
        """Return the marks of all finished work."""
        return {mark for log in self.logs for mark in log.marks}

    @property
    def pieces(self) -> int:
        """Return the number of pieces of work, including repeated ones."""
        return sum(len(numbers) for log in self.logs for numbers in log.work.values())

    @property
    def stage_of_death(self) -> str:
        """Return the stage of the last attempt when it was killed; ``START`` if it was looking up existing artifacts."""
        stages = [*self.stages, END]
        before = stages[: stages.index(self.frontier)]
        return self.frontier if self.logs[-1].finished.issuperset(before) else START

    def repeated_work(self, needed: Mapping[str, list[int]]) -> Iterator[str]:
        """Yield descriptions of stages with more than one repeated piece of work, a missing piece, or a restart."""
        for kind, numbers in needed.items():
            reached, finished = 0, False
            for attempt, log in enumerate(self.logs):
                if done := log.work.get(kind):
                    if finished:
                        yield f"{kind}: attempt {attempt} did {done}, but an earlier attempt had finished the stage"
                    again = reached + 1 - done[0]
                    if again not in (0, 1) or done != list(range(done[0], done[-1] + 1)):
                        yield f"{kind}: attempt {attempt} did {done}, but {reached} had been reached before"
                    reached = max(reached, done[-1])
                finished = finished or stage_of(kind) in log.finished
            if reached != numbers[-1]:
                yield f"{kind}: only {reached} of {numbers[-1]} were done"
