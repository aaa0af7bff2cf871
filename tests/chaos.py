"""Chaos: searches that are killed again and again, and what became of their artifacts and of their work.

    .venv/bin/python tests/chaos.py --model demo --kills 50 --stores /tmp/chaos,s3://bucket/chaos

One search runs in every store, each in turn; a process is killed with SIGKILL (with all it has started) at a random
moment, and the next one begins with an empty Prefect home. A search that ends is compared with one that nobody
disturbed, and another begins in an empty store. Exits with 1 and the reasons if anything differs, or if more than one
piece of work (a layer, say) was done again after a kill. A Prefect server is started for it; one for S3 is not.
"""

import argparse
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from layerwise.flows.orchestration.embedded_server import prefer_quiet_prefect
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.report import REPORT_STAGE
from tests.attempts import Attempt
from tests.demo_search import DEMO
from tests.small_search import small_search
from tests.work_log import END, STAGES, START, Log, Run, mark_of

# Kills come within the next third of a run: then they fall on all of it alike, not mostly on its end.
SHARE_AHEAD = 1 / 3
SHARE_AT_START = 0.1  # of the kills comes before any work


@dataclass(frozen=True)
class Undisturbed:
    """A search that nobody disturbed, in one kind of store."""

    contents: dict[str, str]
    log: Log
    seconds: float

    def moment(self, reached: Set[str], chance: random.Random) -> "Moment | None":
        """A random moment of what is left of a run that has ``reached`` these marks; None: let it end.

        Every layer, shard or loss has the same chance, however long it takes. The moment is told by what is finished
        before it, so that it does not depend on how fast this machine is just now.
        """
        times = self.log.marks
        left = [mark for mark in times if mark not in reached]
        ahead = chance.randint(0, round(SHARE_AHEAD * len(times)))
        if not left or ahead > len(left):
            return None
        if chance.random() < SHARE_AT_START:
            return Moment(frozenset(), chance.uniform(0, min(times.values())))
        marks, ends = list(times), [*times.values(), self.seconds]
        if ahead:
            position = marks.index(left[ahead - 1])
            return Moment(
                frozenset(left[ahead - 1 :]), chance.uniform(0, ends[position + 1] - ends[position])
            )
        # In the first piece of work of the attempt: it comes after the stages that are found, and a preparation.
        stage = left[0].partition(",")[0]
        before = STAGES[: STAGES.index(stage)][-1:]
        first = next(seconds for mark, seconds in times.items() if mark.partition(",")[0] == stage)
        preparation = first - (times[before[0]] if before else 0.0)
        piece = times[left[0]] - ends[max(marks.index(left[0]) - 1, 0)]
        return Moment(frozenset(before), chance.uniform(0, preparation + piece))


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Attributes:
        marks: the first of these must be waited for; none of them: the beginning.
        delay: and how long after it, in seconds.
    """

    marks: frozenset[str]
    delay: float


@dataclass
class Report:
    """What came of it.

    Attributes:
        kills: how many fell into which stage.
        problems: sentences; none if all is well.
        pieces: layers, shards of the import and losses that the disturbed searches computed.
        needed: how many undisturbed searches would have computed in their place.
        seconds: wall time of everything.
    """

    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    searches: int = 0
    pieces: int = 0
    needed: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        fell = ", ".join(
            f"{stage} {self.kills[stage]}" for stage in (START, *STAGES, END) if self.kills[stage]
        )
        return "\n".join(
            [
                f"{self.kills.total()} kills ({fell}) of {self.searches} searches in {self.seconds:.0f} s",
                f"{self.pieces} pieces of work (layers, shards, losses), {self.needed} without the kills",
                *self.problems,
            ]
        )


class Chaos:
    """Searches that are disturbed.

    Args:
        settings: of the search, as plain JSON.
        stores: folders or URLs below which every search gets a store of its own.
        folder: for the processes' Prefect homes and logs.
        prefect_url: the server they report to.
    """

    def __init__(
        self, settings: dict, stores: Sequence[str], folder: Path, prefect_url: str, seed: int
    ) -> None:
        self.settings, self.stores, self.folder, self.prefect_url = settings, stores, folder, prefect_url
        self.chance, self.attempts, self.report = random.Random(seed), 0, Report()

    def run(self, kills: int) -> Report:
        """Disturb searches until ``kills`` processes were killed at work; let the last ones end."""
        began = time.monotonic()
        undisturbed = [self._undisturbed(place) for place in self.stores]
        if any(other.contents != undisturbed[0].contents for other in undisturbed):
            self.report.problems.append("undisturbed searches in different stores differ")
        runs = [self._new_run(place) for place in self.stores]
        while self.report.kills.total() < kills:
            number = self.report.kills.total() % len(runs)
            if not self._killed(runs[number], undisturbed[number]):
                self._compare(runs[number], undisturbed[number])
                runs[number] = self._new_run(self.stores[number])
        for run, expected in zip(runs, undisturbed, strict=True):
            if run.logs:
                attempt = self._begin(run)
                attempt.result()
                run.logs.append(Log.of(attempt.lines))
                self._compare(run, expected)
        self.report.seconds = time.monotonic() - began
        return self.report

    def _killed(self, run: Run, undisturbed: Undisturbed) -> bool:
        """Whether the next attempt of ``run`` was killed at work; if not, the run has ended."""
        moment = undisturbed.moment(run.marks, self.chance)
        attempt = self._begin(run)
        killed = moment is not None and self._arrives(attempt, moment) and attempt.kill()
        if not killed:
            attempt.result()
        run.logs.append(Log.of(attempt.lines))
        if killed:
            self.report.kills[run.stage_of_death] += 1
        return killed

    def _arrives(self, attempt: Attempt, moment: Moment) -> bool:
        """Wait for ``moment``; False if the attempt has ended before."""
        if moment.marks and not attempt.wait_for(lambda line: mark_of(line) in moment.marks):
            return False
        return attempt.run_for(moment.delay)

    def _compare(self, run: Run, undisturbed: Undisturbed) -> None:
        """Compare a run that has ended with the undisturbed one; remove its store if all is well."""
        store = ArtifactStore(run.store)
        problems = list(run.repeated_work(undisturbed.log.work))
        found = contents_of(store)
        for key in sorted(found.keys() | undisturbed.contents.keys()):
            if found.get(key) != undisturbed.contents.get(key):
                problems.append(f"{key} is {found.get(key)}, undisturbed {undisturbed.contents.get(key)}")
        self.report.problems += [f"{run.store} after {len(run.logs)} attempts: {it}" for it in problems]
        self.report.searches += 1
        self.report.pieces += run.pieces
        self.report.needed += sum(len(numbers) for numbers in undisturbed.log.work.values())
        if not problems:
            store.fs.rm(store.root, recursive=True)

    def _undisturbed(self, place: str) -> Undisturbed:
        run = self._new_run(place)
        attempt = self._begin(run)
        attempt.result()
        store = ArtifactStore(run.store)
        contents = contents_of(store)
        store.fs.rm(store.root, recursive=True)
        return Undisturbed(contents, Log.of(attempt.lines), attempt.lines[-1][0])

    def _new_run(self, place: str) -> Run:
        return Run(f"{place}/{uuid.uuid4().hex}")

    def _begin(self, run: Run) -> Attempt:
        self.attempts += 1
        folder = self.folder / f"attempt-{self.attempts:03d}"
        attempt = Attempt(folder, self.prefect_url)
        attempt.begin(self.settings, {"store": run.store, "boundary_layers": 1})
        return attempt


def contents_of(store: ArtifactStore) -> dict[str, str]:
    """The digest of every artifact's bytes, by its key; but for reports, which tell what took how long."""
    return {
        artifact.key: artifact.content
        for artifact in store.artifacts()
        if artifact.recipe["name"] != REPORT_STAGE
    }


def main() -> None:
    prefer_quiet_prefect()  # before Prefect is imported
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="small", help="small: random weights; demo; or what a search takes"
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--stores", help="folders and URLs, with commas between; a temporary folder if left out"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    model = arguments.model
    settings = (
        small_search(folder / "model") if model == "small" else DEMO | {"model": model, "beta_count": 3}
    )
    stores = arguments.stores.split(",") if arguments.stores else [str(folder / "stores")]
    with prefect_test_harness(server_startup_timeout=120):
        chaos = Chaos(settings, stores, folder / "attempts", str(PREFECT_API_URL.value()), arguments.seed)
        report = chaos.run(arguments.kills)
    sys.stdout.write(f"{report}\nlogs of all attempts: {folder}\n")
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
