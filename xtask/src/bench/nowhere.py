#!/usr/bin/env python3
"""A provider that reads a disk to nowhere, and leaves in a file how many seconds that took."""
import os
import subprocess
import sys
import time

sys.dont_write_bytecode = True
sys.path.insert(0, os.environ["PROVIDERS"])
from provider import serve


class Nowhere:
    def hello(self, protocol, stillpoint, options):
        self.mechanism, self.seconds = options["mechanism"], options["seconds"]
        return {"protocol": 1, "name": "nowhere", "capabilities": [], "mechanism": self.mechanism}

    def job_init(self):
        return {"target": "00000001"}

    def job_cleanup(self):
        pass

    def backup_init(self, vm, point):
        pass

    def backup_cleanup(self):
        pass

    def commit(self, record):
        pass

    def backup_vm(self, config, volumes, bandwidth_limit=None):
        volume = volumes[0]
        kind, handle = next(iter(volume["handle"].items()))
        if kind == "nbd":
            address = f"nbd+unix:///{handle['export']}?socket={handle['socket']}"
            line = ["nbdcopy", "--no-extents", "--connections=1", address, "null:"]
        else:
            line = ["dd", f"if={handle['path']}", "of=/dev/null", "bs=4M"]
        began = time.monotonic()
        subprocess.run(line, check=True, capture_output=True)
        with open(self.seconds, "w") as file:
            file.write(str(time.monotonic() - began))
        return {"volumes": [{"name": volume["name"], "stored": 0}]}


serve(Nowhere())
