"""Automations: Prefect's command accepts the file, and the server notifies of results and failures."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import get_client

AUTOMATIONS = Path(__file__).parents[2] / "deployments" / "automations.yaml"
NAMES = {each["name"] for each in yaml.safe_load(AUTOMATIONS.read_text())["automations"]}


@pytest.fixture
def webhook():
    """URL of a server that receives notifications, and the list of those received."""
    taken = []

    class Take(BaseHTTPRequestHandler):
        def do_POST(self):
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Take) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", taken
        server.shutdown()


@pytest.fixture
def automations(recording_server, webhook, tmp_path):
    """Automations of the file on the server, by name."""
    block = CustomWebhookNotificationBlock(
        name="layerwise", url=webhook[0], json_data={"text": "{{subject}}: {{body}}"}
    )
    block_id = str(block.save("layerwise-test"))
    file = tmp_path / "automations.yaml"
    file.write_text(AUTOMATIONS.read_text().replace("NOTIFICATION_BLOCK", block_id))
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "automation",
        "create",
        "--from-file",
        str(file),
    ]
    environment = {**os.environ, "PREFECT_API_URL": recording_server}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    with get_client(sync_client=True) as client:
        created = [each for each in client.read_automations() if each.name in NAMES]
        yield {each.name: each for each in created}
        for each in created:
            client.delete_automation(each.id)


def test_the_server_accepts_all_automations_and_notifies_of_results_and_failures(automations, webhook):
    assert set(automations) == NAMES
    assert all(each.enabled for each in automations.values())

    @flow(name="search", flow_run_name="some model at 0.5", persist_result=False)
    def search(model: str) -> None:
        if model == "none":
            raise ValueError("no such model")
        create_table_artifact([{"beta": 0}], key="search-result", description="some model: 3 % below uniform")

    @flow(name="something-else", persist_result=False)
    def something_else() -> None:
        create_table_artifact([{"beta": 0}], key="other-table")

    @flow(name="watch", flow_run_name="watch s3://bucket", persist_result=False)
    def watch() -> None:
        raise OSError("no such bucket")

    something_else()
    for _ in range(3):
        with pytest.raises(OSError, match="no such bucket"):
            watch()
    search("model")
    with pytest.raises(ValueError, match="no such model"):
        search("none")
    deadline = time.monotonic() + 60
    while len(webhook[1]) < 3:
        assert time.monotonic() < deadline, f"three notifications within a minute, but {webhook[1]}"
        time.sleep(0.1)
    time.sleep(1)  # for notifications that should not be
    texts = [each["text"] for each in webhook[1]]
    [looked] = [text for text in texts if text.startswith("watch Failed: watch s3://bucket")]
    [failed] = [text for text in texts if text.startswith("search Failed: some model at 0.5")]
    [finished] = [text for text in texts if text.startswith("search finished: some model at 0.5")]
    assert len(texts) == 3
    assert "no such bucket" in looked
    assert "no such model" in failed
    assert "some model: 3 % below uniform" in finished
