"""Process of the embedded Prefect server, on a port that its parent process has reserved."""

import socket
import sys

from layerwise.flows.orchestration.parent_process import end_with_parent


def main() -> None:
    """Serve until all processes that hold the other end of our standard input have ended."""
    end_with_parent(grace=5.0)  # the time that Prefect gives a server to stop
    import uvicorn

    listening = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on"
    )
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
