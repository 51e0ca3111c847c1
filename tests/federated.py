"""A study over the engine, run as a process: its folder, what it says, and what crossed.

Run as a module it is that process: it lets all parties of a simulated consortium run their study,
and keeps every payload that crosses, before it is wrapped by the engine's transport security.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

SITES = (170, 120, 110, 100)
TIMEOUT_S = 10


def build(root: Path) -> tuple[str, ...]:
    """Write the tables of a consortium with four training sites, and a study with secure sums."""
    from flows.demo import write_consortium

    names = write_consortium(root, SITES, seed=3, tables_only=True, secure_sum=True)
    study = root / "study.toml"
    text = study.read_text()
    study.write_text(
        text.replace("[federation]", f"[federation]\ntimeout_s = {TIMEOUT_S}\nmin_sites = 3")
    )
    return names


def run(root: Path) -> dict[str, object]:
    """Run the study of a built folder in a process of its own; give its summary."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.federated", str(root)],
        capture_output=True, text=True, timeout=500, check=False, env=env,
        cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root.parent / "summary.json").read_text())


def _capture(target: Path, stop: threading.Event) -> None:
    """Write what passes over the loopback interface, where this process may see it."""
    try:
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
        wire.bind(("lo", 0))
    except (AttributeError, PermissionError, OSError):
        return
    wire.settimeout(0.5)
    with target.open("wb") as file, wire:
        while not stop.is_set():
            try:
                file.write(wire.recv(1 << 17))
            except TimeoutError:
                continue


def main() -> None:
    root = Path(sys.argv[1])
    stop = threading.Event()
    traffic = threading.Thread(target=_capture, args=(root.parent / "traffic.bin", stop))
    traffic.start()
    try:
        _study(root)
    finally:
        stop.set()
        traffic.join()


def _study(root: Path) -> None:
    from flows.demo import run_workspace
    from flows.terminal import serving
    from infra.settings import Workspace

    names = Workspace(root=root).site_names()
    with serving(root, as_json=True) as run, (root.parent / "payloads.bin").open("wb") as heard:
        import fusion.flare

        plain = fusion.flare.FlareTransport.ask

        def ask(self, payload, sites):  # type: ignore[no-untyped-def]
            replies = plain(self, payload, sites)
            heard.write(payload + b"".join(replies.values()))
            return replies

        fusion.flare.FlareTransport.ask = ask  # type: ignore[method-assign]
        summary = run_workspace(root, names, run, federation="flare")
    summary.pop("table")
    (root.parent / "summary.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    main()
