"""The process of the embedded Prefect server, on a port of this machine that its parent has reserved."""

import socket
import sys

from layerwise.flows.orchestration.parent_process import end_with_parent


def main() -> None:
    """Serve until the parent, and all who share its end of our standard input, have ended."""
    end_with_parent(grace=5.0)  # as long as Prefect gives a server that it stops
    import uvicorn

    listening = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on"
    )
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
