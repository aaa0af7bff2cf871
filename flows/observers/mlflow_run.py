"""Run of MLflow for one search. The server is that of ``MLFLOW_TRACKING_URI``, the experiment ``MLFLOW_EXPERIMENT_NAME``."""

import os
import time
from collections.abc import Mapping, Sequence

from layerwise.flows.observers.search_tracker import (
    KEY_TAG,
    SEARCH_TAG,
    SECONDS_PER_REQUEST,
    EndState,
    Metric,
)

EXPERIMENT = "layerwise"
STATUS: dict[EndState, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
MOST_METRICS = 1000  # in one request
LONGEST = 6000  # characters of a parameter


class MLflowRun:
    """Implements ``TrackedRun``."""

    def __init__(self, search: str, title: str) -> None:
        # By default, the client repeats a request for minutes, in which the search would wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(SECONDS_PER_REQUEST))
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        query = f"tags.`{SEARCH_TAG}` = '{search}'"
        runs = self._client.search_runs(
            [experiment], query, max_results=1, order_by=["attributes.start_time DESC"]
        )
        if runs:
            run = runs[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            run = self._client.create_run(experiment, tags={SEARCH_TAG: search}, run_name=title)
        self._id, self._tags = run.info.run_id, dict(run.data.tags)
        self._params = dict(run.data.params)
        self._logged: set[tuple[str, int]] = set()  # metrics and steps of this process

    @property
    def key(self) -> str:
        return str(self._tags.get(KEY_TAG, ""))

    def log(self, params: Mapping[str, str], tags: Mapping[str, str], metrics: Sequence[Metric]) -> None:
        from mlflow.entities import Metric as Entry
        from mlflow.entities import Param, RunTag

        now = int(1000 * time.time())
        left = [each for each in metrics if (each.name, each.step) not in self._logged]
        for first in range(0, len(left), MOST_METRICS):
            some = left[first : first + MOST_METRICS]
            entries = [Entry(each.name, each.value, now, each.step) for each in some]
            self._client.log_batch(self._id, metrics=entries)
            self._logged |= {(each.name, each.step) for each in some}
        # MLflow refuses to change a parameter.
        new = [Param(name, value[:LONGEST]) for name, value in params.items() if name not in self._params]
        self._client.log_batch(self._id, params=new, tags=[RunTag(*tag) for tag in tags.items()])
        self._tags |= tags

    def log_file(self, name: str, content: bytes) -> None:
        self._client.log_text(self._id, content.decode(), name)

    def end(self, state: EndState) -> None:
        self._client.set_terminated(self._id, STATUS[state])
