"""Chaos test: kill searches at random moments, and check their artifacts and the amount of repeated work.

    .venv/bin/python tests/chaos.py --model demo --kills 50 --stores /tmp/chaos,s3://bucket/chaos

Every store has one search, and the searches take turns. A process and its children are killed with SIGKILL at a random
moment, and the next process starts with an empty Prefect home. A finished search is compared with an undisturbed one,
and a new search starts in an empty store. Exits with 1 and the reasons if anything differs, or if more than one piece
of work (such as a layer) was repeated after a kill. Starts its own Prefect server, but needs an S3 server for S3 URLs.
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
from tests.work_log import END, RECOVERING_STAGES, STAGES, START, Log, Run, mark_of, stage_of

# Kills come within the next third of a run, so that they are spread over the whole run and not mostly at its end.
SHARE_AHEAD = 1 / 3
SHARE_AT_START = 0.1  # fraction of the kills before any work


@dataclass(frozen=True)
class Undisturbed:
    """An undisturbed search, in one kind of store."""

    contents: dict[str, str]
    log: Log
    seconds: float

    def moment(self, reached: Set[str], chance: random.Random) -> "Moment | None":
        """Return a random moment in the rest of a run that has ``reached`` these marks; None to let it end.

        Every layer, shard or loss has the same probability, however long it takes. A moment is defined by the work
        finished before it, so it does not depend on the current speed of this machine.
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
        # In the first piece of work of the attempt, which follows the stages that are found, and a preparation.
        stage = stage_of(left[0])
        stages = RECOVERING_STAGES if "recover" in self.log.finished else STAGES
        before = stages[: stages.index(stage)][-1:]
        first = next(seconds for mark, seconds in times.items() if stage_of(mark) == stage)
        preparation = first - (times[before[0]] if before else 0.0)
        piece = times[left[0]] - ends[max(marks.index(left[0]) - 1, 0)]
        return Moment(frozenset(before), chance.uniform(0, preparation + piece))


@dataclass(frozen=True)
class Moment:
    """Moment to kill a process.

    Attributes:
        marks: wait for the first of these marks; empty for the start of the process.
        delay: seconds to wait after it.
    """

    marks: frozenset[str]
    delay: float


@dataclass
class Report:
    """Result of a chaos test.

    Attributes:
        kills: number of kills by stage.
        problems: sentences; empty if all checks passed.
        searches: number of finished searches.
        pieces: layers, shards of the import and losses that the disturbed searches computed.
        needed: number of pieces that undisturbed searches would have computed.
        seconds: total wall time.
    """

    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    searches: int = 0
    pieces: int = 0
    needed: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        fell = ", ".join(
            f"{stage} {self.kills[stage]}" for stage in (START, *RECOVERING_STAGES, END) if self.kills[stage]
        )
        return "\n".join(
            [
                f"{self.kills.total()} kills ({fell}) of {self.searches} searches in {self.seconds:.0f} s",
                f"{self.pieces} pieces of work (layers, shards, losses), {self.needed} without the kills",
                *self.problems,
            ]
        )


class Chaos:
    """Runner of disturbed searches.

    Args:
        settings: settings of the search, as plain JSON.
        stores: folders or URLs below which every search gets its own store.
        folder: folder for Prefect homes and logs of the processes.
        prefect_url: URL of the Prefect server.
        seed: seed of the random moments.
    """

    def __init__(
        self, settings: dict, stores: Sequence[str], folder: Path, prefect_url: str, seed: int
    ) -> None:
        self.settings, self.stores, self.folder, self.prefect_url = settings, stores, folder, prefect_url
        self.chance, self.attempts, self.report = random.Random(seed), 0, Report()

    def run(self, kills: int, stages: Set[str] = frozenset()) -> Report:
        """Kill searches until ``kills`` processes were killed at work, then let the last searches finish.

        Args:
            kills: number of kills.
            stages: kill up to twice as many processes, until a kill has fallen on each of these stages.
        """
        began = time.monotonic()
        undisturbed = [self._undisturbed(place) for place in self.stores]
        if any(other.contents != undisturbed[0].contents for other in undisturbed):
            self.report.problems.append("undisturbed searches in different stores differ")
        runs = [self._new_run(place) for place in self.stores]
        done = self.report.kills
        while done.total() < kills or (stages - set(done) and done.total() < 2 * kills):
            number = done.total() % len(runs)
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
        """Return whether the next attempt of ``run`` was killed at work; if not, the run has ended."""
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
        """Wait for ``moment``; return False if the attempt ends first."""
        if moment.marks and not attempt.wait_for(lambda line: mark_of(line) in moment.marks):
            return False
        return attempt.run_for(moment.delay)

    def _compare(self, run: Run, undisturbed: Undisturbed) -> None:
        """Compare a finished run with the undisturbed one; remove its store if there are no problems."""
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
        return Run(f"{place}/{uuid.uuid4().hex}", recovers="recover" in self.settings)

    def _begin(self, run: Run) -> Attempt:
        self.attempts += 1
        folder = self.folder / f"attempt-{self.attempts:03d}"
        attempt = Attempt(folder, self.prefect_url)
        attempt.begin(self.settings, {"store": run.store, "boundary_layers": 1})
        return attempt


def contents_of(store: ArtifactStore) -> dict[str, str]:
    """Return the content digest of every artifact by key, except reports, which contain run times."""
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
        "--model", default="small", help="small (random weights), or a model source that a search accepts"
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--stores", help="comma-separated folders and URLs; default: a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recover", choices=("refit", "train"), help="recover the pruned layers")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    model = arguments.model
    settings = (
        small_search(folder / "model") if model == "small" else DEMO | {"model": model, "beta_count": 3}
    )
    settings |= {} if arguments.recover is None else {"recover": arguments.recover}
    stores = arguments.stores.split(",") if arguments.stores else [str(folder / "stores")]
    with prefect_test_harness(server_startup_timeout=120):
        chaos = Chaos(settings, stores, folder / "attempts", str(PREFECT_API_URL.value()), arguments.seed)
        report = chaos.run(arguments.kills)
    sys.stdout.write(f"{report}\nlogs of all attempts: {folder}\n")
    sys.exit(bool(report.problems))


if __name__ == "__main__":
    main()
