"""What every Stillpoint provider in Python needs: the conversation with Stillpoint, and nothing else.

A provider is an object with a method for each request that it answers, named as the request is (docs/provider-protocol.md).
Each takes the request's parameters as keyword arguments and returns the result's fields as a dict, or None for {}.
Raise ProviderError to answer with an error of a kind that Stillpoint knows.
"""

import json
import queue
import sys
import threading


class ProviderError(Exception):
    """An error with a kind: target-missing, target-foreign, target-read-only, target-full, unauthorized, unreachable,
    invalid-input, unsupported, locked, not-found, damaged, source, cancelled, commit-unknown or io."""

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


class Stillpoint:
    """The other side: what a provider may ask of it, and whether it has cancelled."""

    def __init__(self, output):
        self._output = output
        self._lock = threading.Lock()
        self._next = 0
        self._answers = {}
        self.cancelled = threading.Event()

    def _send(self, message):
        line = json.dumps({"jsonrpc": "2.0", **message}) + "\n"
        with self._lock:
            self._output.write(line.encode())
            self._output.flush()

    def log(self, message, level="info"):
        self._send({"method": "log", "params": {"level": level, "message": message}})

    def progress(self, message=""):
        self._send({"method": "progress", "params": {"message": message}})

    def _ask(self, method, **params):
        answer = queue.Queue(1)
        with self._lock:
            self._next += 1
            number = self._next
            self._answers[number] = answer
        self._send({"id": number, "method": method, "params": params})
        message = answer.get()
        if "error" in message:
            raise ProviderError("source", message["error"]["message"])
        return message["result"]

    def dirty_regions(self, volume):
        """All regions of a disk that have to be read: (offset, length, reads as zeroes)."""
        position = 0
        while position is not None:
            answer = self._ask("next_dirty_regions", volume=volume, **{"from": position})
            for region in answer["regions"]:
                yield region["offset"], region["length"], region.get("zero", False)
            position = answer.get("next")

    def release(self, volume, offset, length):
        """Says that this part of a disk is not read again."""
        self._ask("release", volume=volume, offset=offset, length=length)


def serve(provider):
    """Answers one request after the other until Stillpoint closes our standard input."""
    stillpoint = provider.stillpoint = Stillpoint(sys.stdout.buffer)
    # What else prints must not end up among the messages.
    sys.stdout = sys.stderr
    requests = queue.Queue()

    def listen():
        for line in sys.stdin.buffer:
            message = json.loads(line)
            if "method" not in message:
                stillpoint._answers.pop(message["id"]).put(message)
            elif message["method"] == "cancel":
                stillpoint.cancelled.set()
            else:
                requests.put(message)
        stillpoint.cancelled.set()
        requests.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (request := requests.get()) is not None:
        try:
            method = getattr(provider, request["method"], None)
            if method is None or request["method"].startswith("_"):
                raise ProviderError("unsupported", "there is no such method")
            result = method(**request.get("params", {}))
            stillpoint._send({"id": request["id"], "result": result or {}})
        except Exception as error:  # pylint: disable=broad-except
            kind = getattr(error, "kind", "target-full" if getattr(error, "errno", 0) == 28 else "io")
            answer = {"code": -32000, "message": f"{error}" or type(error).__name__, "data": {"kind": kind}}
            stillpoint._send({"id": request["id"], "error": answer})
