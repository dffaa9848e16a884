"""A small NBD client: reads, trims, and the map of what is dirty. Standard library only.

https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md; all integers are big-endian.
"""

import socket
import struct

OPT_GO, OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT = 7, 8, 10
REP_ACK, REP_INFO, REP_META_CONTEXT, REP_ERROR = 1, 3, 4, 1 << 31
CMD_READ, CMD_DISC, CMD_TRIM, CMD_BLOCK_STATUS = 0, 2, 4, 7
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_ERROR = 0, 1, 2, 5, 1 << 15
ZERO, DIRTY = 2, 1


class NbdError(Exception):
    """The server's own words."""


class Client:
    """One connection to one export."""

    def __init__(self, path, export, dirty_context=None):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._cookie = 0
        self._contexts = {}
        magic, options, _ = struct.unpack(">QQH", self._take(18))
        if (magic, options) != (0x4E42444D41474943, 0x49484156454F5054):
            raise NbdError("this is no NBD server")
        self._socket.sendall(struct.pack(">I", 3))
        self._option(OPT_STRUCTURED_REPLY, b"")
        wanted = ["base:allocation"] + ([dirty_context] if dirty_context else [])
        name = export.encode()
        query = struct.pack(">I", len(name)) + name + struct.pack(">I", len(wanted))
        for context in wanted:
            query += struct.pack(">I", len(context)) + context.encode()
        for kind, data in self._option(OPT_SET_META_CONTEXT, query):
            if kind == REP_META_CONTEXT:
                self._contexts[struct.unpack(">I", data[:4])[0]] = data[4:].decode()
        if len(self._contexts) != len(wanted):
            raise NbdError(f"the export has {list(self._contexts.values())}, not {wanted}")
        for kind, data in self._option(OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0)):
            if kind == REP_INFO and data[:2] == b"\0\0":
                self.size = struct.unpack(">Q", data[2:10])[0]

    def _take(self, length):
        data = bytearray()
        while len(data) < length:
            part = self._socket.recv(min(length - len(data), 1 << 20))
            if not part:
                raise NbdError("the server has closed the connection")
            data += part
        return bytes(data)

    def _option(self, option, data):
        self._socket.sendall(struct.pack(">QII", 0x49484156454F5054, option, len(data)) + data)
        replies = []
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._take(20))
            reply = self._take(length)
            if kind & REP_ERROR:
                raise NbdError(f"option {option}: {reply.decode(errors='replace')}")
            if kind == REP_ACK:
                return replies
            replies.append((kind, reply))

    def _request(self, command, offset, length):
        """All chunks of the reply; an error among them is raised when it is complete."""
        self._cookie += 1
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, self._cookie, offset, length))
        chunks, error = [], None
        while True:
            _, flags, kind, _, payload = struct.unpack(">IHHQI", self._take(20))
            data = self._take(payload)
            if kind & CHUNK_ERROR:
                error = NbdError(f"at {offset}: {data[6:].decode(errors='replace')}")
            else:
                chunks.append((kind, data))
            if flags & 1:
                if error:
                    raise error
                return chunks

    def read(self, offset, length):
        data = bytearray(length)
        for kind, chunk in self._request(CMD_READ, offset, length):
            if kind == CHUNK_DATA:
                start = struct.unpack(">Q", chunk[:8])[0] - offset
                data[start : start + len(chunk) - 8] = chunk[8:]
        return bytes(data)

    def trim(self, offset, length):
        self._request(CMD_TRIM, offset, length)

    def map(self):
        """(offset, length, dirty, zero) from the start of the disk to its end, or an error."""
        offset = 0
        while offset < self.size:
            flags = {}
            for kind, chunk in self._request(CMD_BLOCK_STATUS, offset, min(self.size - offset, 1 << 30)):
                if kind == CHUNK_STATUS:
                    context = self._contexts[struct.unpack(">I", chunk[:4])[0]]
                    flags[context] = [struct.unpack(">II", chunk[i : i + 8]) for i in range(4, len(chunk), 8)]
            if len(flags) != len(self._contexts):
                raise NbdError(f"the map is not told at {offset}")
            for length, dirty, zero in merge(flags):
                yield offset, length, dirty, zero
                offset += length

    def close(self):
        self._socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, CMD_DISC, 0, 0, 0))
        self._socket.close()


def merge(flags):
    """Both maps in one, as far as both go. Without a map of what is dirty, all is."""
    zero = [[length, bool(bits & ZERO)] for length, bits in flags.pop("base:allocation")]
    dirty = [[length, bool(bits & DIRTY)] for length, bits in next(iter(flags.values()), [])]
    if not dirty:
        dirty = [[sum(length for length, _ in zero), True]]
    while zero and dirty:
        length = min(zero[0][0], dirty[0][0])
        yield length, dirty[0][1], zero[0][1]
        for part in (zero, dirty):
            part[0][0] -= length
            if not part[0][0]:
                part.pop(0)
