"""Faults of a request, for ``FaultProxy.inject``."""

from dataclasses import replace

from tests.fault_proxy import Answer, Exchange, Fault

ERROR_BODY = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>made by the proxy</Message></Error>"
ERROR_CODES = {403: b"AccessDenied", 404: b"NoSuchBucket", 500: b"InternalError", 503: b"ServiceUnavailable"}


def cut_body(exchange: Exchange) -> None:
    """Close the connection in the middle of the body, or before the head if the body is empty."""
    answer = exchange.forward()
    if len(answer.body) > 1:
        exchange.send(answer, stop_after=len(answer.body) // 2)
    exchange.hang_up()


def error(status: int) -> Fault:
    """Answer with this status without forwarding the request."""

    def fault(exchange: Exchange) -> None:
        exchange.send(Answer(status, [("Content-Type", "application/xml")], ERROR_BODY % ERROR_CODES[status]))

    return fault


def stall_before_head(seconds: float) -> Fault:
    """Forward the request, but delay the response by this time."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        exchange.wait(seconds)
        exchange.send(answer)

    return fault


def stall_in_body(seconds: float) -> Fault:
    """Pause for this time in the middle of the body."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.forward()
        exchange.send(answer, stop_after=len(answer.body) // 2)
        exchange.wait(seconds)
        exchange.send_rest(answer, len(answer.body) // 2)

    return fault


def truncate(exchange: Exchange) -> None:
    """Omit the second half of the body, with a matching Content-Length, so that the client cannot detect it."""
    answer = exchange.forward()
    exchange.send(replace(answer, body=answer.body[: len(answer.body) // 2]))


def flip_bit(exchange: Exchange) -> None:
    """Change one bit in the middle of the body."""
    answer = exchange.forward()
    body = bytearray(answer.body)
    if body:
        body[len(body) // 2] ^= 1
    exchange.send(replace(answer, body=bytes(body)))


def duplicate(exchange: Exchange) -> None:
    """Forward the request twice, and return the second response."""
    exchange.forward()
    exchange.send(exchange.forward())


def lose_answer(exchange: Exchange) -> None:
    """Forward the request, and close the connection without a response."""
    exchange.forward()
    exchange.hang_up()


def ignore_condition(exchange: Exchange) -> None:
    """Answer 200 instead of 412, like servers that do not support If-None-Match."""
    answer = exchange.forward()
    exchange.send(Answer(200, [("ETag", '"0"')], b"") if answer.status == 412 else answer)
