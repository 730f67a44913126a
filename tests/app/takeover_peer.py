"""A taker that breaks off at a step of the takeover: ``takeover_peer.py RPC-SOCKET STEP``. A process of its own, for the giver may kill it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time

from qpair.app import parcel
from qpair.app.takeover.messages import Failed, FromGiver, Go, Handover, Offer, Prepared, Ready


def main(address: str, step: str) -> None:
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as rpc:
        listener.bind(f"{directory}/s")
        listener.listen()
        rpc.connect(address)
        params = {"socket": f"{directory}/s", "protocols": [99] if step == "version" else [1, 99], "version": "9.9"}
        rpc.sendall(json.dumps({"id": 1, "method": "qpair_takeover", "params": params}).encode())
        answer = json.loads(rpc.recv(65536))
        print(json.dumps(answer), flush=True)
        if "error" in answer:
            return
        giver, _ = listener.accept()
    walk(giver, step)


def walk(giver: socket.socket, step: str) -> None:
    if step == "leave at once":
        return
    assert isinstance(parcel.receive(giver, FromGiver), Offer)
    at(step, "offer", giver)
    parcel.send(giver, Prepared())
    handover = parcel.receive(giver, FromGiver)
    assert isinstance(handover, Handover), handover
    print(f"{len(handover.controllers)} controllers, {sum(c.session is not None for c in handover.controllers)} sessions", flush=True)
    at(step, "handover", giver)
    parcel.send(giver, Ready())
    assert isinstance(parcel.receive(giver, FromGiver), Go)


def at(step: str, place: str, giver: socket.socket) -> None:
    """Break off here, if this is where."""
    if step == f"die at {place}":
        os.kill(os.getpid(), signal.SIGKILL)
    elif step == f"fail at {place}":
        parcel.send(giver, Failed("no wish to"))
        time.sleep(60)
    elif step == f"nonsense at {place}":
        giver.sendall(b"nonsense, which is a length of many bytes")
        time.sleep(60)
    elif step == f"ready at {place}":
        parcel.send(giver, Ready())
        time.sleep(60)
    elif step == f"wait at {place}":
        time.sleep(60)
    elif step == f"close at {place}":
        giver.close()
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
