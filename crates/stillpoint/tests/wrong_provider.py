"""A provider that does one thing wrong, named by its first argument; in all else it is the example raw-images."""

import importlib.machinery
import importlib.util
import os
import socket
import struct
import sys
import time

sys.dont_write_bytecode = True
EXAMPLES = os.environ["EXAMPLES"]
sys.path.insert(0, EXAMPLES)
LOADER = importlib.machinery.SourceFileLoader("raw_images", EXAMPLES + "/raw-images")
SPEC = importlib.util.spec_from_loader("raw_images", LOADER)
RAW_IMAGES = importlib.util.module_from_spec(SPEC)
LOADER.exec_module(RAW_IMAGES)

WRONG, TARGET = sys.argv[1:3]


def forever():
    while True:
        time.sleep(3600)


def every_wrong_request(volume):
    """Each has to be refused, and the connection has to go on; connections with half a request stay open."""
    handle, size = volume["handle"]["nbd"], volume["size"]

    def connect():
        return RAW_IMAGES.Client(handle["socket"], handle["export"], handle.get("dirty_context"))

    def refused(client, command, offset, length, payload=b"", flags=0):
        client._cookie += 1
        head = struct.pack(">IHHQQI", 0x25609513, flags, command, client._cookie, offset, length)
        client._socket.sendall(head + payload)
        _, _, kind, _, rest = struct.unpack(">IHHQI", client._take(20))
        client._take(rest)
        if not kind & 0x8000:
            raise AssertionError(f"command {command} at {offset}+{length} was not refused")

    client = connect()
    for command in (0, 4, 7):
        for offset, length in ((size, 1), (size - 1, 2), (0, 0), (2**64 - 1, 1), (2**63, 4096), (1, 2**32 - 1)):
            refused(client, command, offset, length)
    refused(client, 0, 0, (32 << 20) + 1)
    refused(client, 1, 0, 4096, bytes(4096))
    refused(client, 6, 0, 4096)
    refused(client, 99, 0, 4096)
    refused(client, 4, 0, 512, flags=1 << 9)
    # Right, but nothing that an older QEMU would survive.
    for offset, length in ((1, 1), (3, 65537), (65535, 2), (size - 7, 7), (513, size - 1024)):
        client.trim(offset, length)
    held = [client]
    for part in range(1, 28, 3):
        half = connect()
        half._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 65536)[:part])
        held.append(half)
    for part in (b"", b"\0" * 7, b"\0\0\0\3IHAVEOPT\0\0\0\7\xff\xff\xff\xff"):
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(handle["socket"])
        raw.sendall(part)
        held.append(raw)
    greedy = connect()
    for cookie in range(64):
        greedy._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, cookie, 0, min(size, 1 << 20)))
    return held + [greedy]


class WrongProvider(RAW_IMAGES.RawImages):
    def hello(self, **params):
        if WRONG == "never-greets":
            forever()
        answer = super().hello(**params)
        if WRONG == "another-protocol":
            answer["protocol"] = 2
        if WRONG == "another-form":
            return {"name": 7}
        return answer

    def job_init(self):
        if WRONG == "a-name-as-trap":
            return {"target": "../../x"}
        return super().job_init()

    def backup_vm_query_incremental(self, disks):
        if WRONG == "a-generation-of-its-own":
            return {"disks": [{"since": "20200101T000000Z-00000000"} for _ in disks]}
        return super().backup_vm_query_incremental(disks)

    def backup_vm(self, **params):
        out = sys.__stdout__.buffer
        if WRONG == "crashes":
            os._exit(3)
        elif WRONG == "hangs":
            forever()
        elif WRONG == "speaks-nonsense":
            out.write(b"Traceback (most recent call last):\n")
            out.flush()
            forever()
        elif WRONG == "never-ends-a-line":
            piece = b"x" * (1 << 20)
            for _ in range(1024):
                out.write(piece)
            out.flush()
            forever()
        elif WRONG == "closes-its-input":
            os.close(0)
            forever()
        elif WRONG == "leaves-a-child":
            if os.fork() == 0:
                os.setsid()
                forever()
            os._exit(0)
        elif WRONG == "reads-nothing":
            return {"volumes": [{"name": volume["name"], "stored": 0} for volume in params["volumes"]]}
        elif WRONG == "is-full":
            raise OSError(28, "No space left on device")
        elif WRONG == "forgets-a-disk":
            return {"volumes": super().backup_vm(**params)["volumes"][1:]}
        elif WRONG == "reads-elsewhere":
            source = RAW_IMAGES.open_source(params["volumes"][0], self.stillpoint)
            source.read(0, params["volumes"][0]["size"])
        elif WRONG == "sends-wrong-requests":
            # One disk is stored before, since its old data is given back in every way but the right one.
            answer = super().backup_vm(**params)
            self.held = every_wrong_request(params["volumes"][0])
            return answer
        elif WRONG == "keeps-its-connections":
            self.held = [RAW_IMAGES.open_source(params["volumes"][0], self.stillpoint) for _ in range(8)]
        return super().backup_vm(**params)

    def commit(self, record):
        if WRONG == "lies-about-a-commit":
            return
        if WRONG == "dies-in-a-commit":
            os._exit(1)
        if WRONG == "hangs-in-a-commit":
            forever()
        if WRONG == "fails-in-a-commit":
            raise OSError(28, "No space left on device")
        super().commit(record)
        if WRONG == "dies-after-a-commit":
            os._exit(1)


RAW_IMAGES.serve(WrongProvider(TARGET))
