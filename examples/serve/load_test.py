"""Load test of app.py on loopback: requests a second, latencies, and memory of the server.

    python load_test.py MODEL [--requests 400] [--clients 1 4 16] [--size 640] [--threads 1]

Starts uvicorn with the model, sends JPEGs from 1, 4 and 16 clients that each wait for their answer, with bad uploads
between them, and prints a table. Fails if an answer is not what it should be. Memory is read from /proc, on Linux.
"""

import argparse
import http.client
import io
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

JPEG = {"Content-Type": "image/jpeg"}
FORM = {"Content-Type": "multipart/form-data; boundary=b"}
# Body, headers and expected status of uploads that are wrong.
BAD = (
    (b"", JPEG, 422),
    (b"no image at all", JPEG, 422),
    (b"--b\r\nbroken", FORM, 400),
    (bytes(30_000_000), JPEG, 413),
)


def photo(size: int, seed: int) -> bytes:
    """A JPEG with some structure in it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((size, size * 3 // 4), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def memory(pid: int) -> float:
    """Resident memory in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024


@contextmanager
def served(model: str, threads: int) -> Iterator[tuple[int, int]]:
    """A server's port and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "HF_SEGVIT_MODEL": os.path.abspath(model), "HF_SEGVIT_THREADS": str(threads)}
    command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning"]
    with subprocess.Popen(command, cwd=Path(__file__).parent, env=environment) as server:
        try:
            while True:
                if server.poll() is not None:
                    raise SystemExit("the server did not start; see above")
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield port, server.pid
        finally:
            server.terminate()


def post(connection: http.client.HTTPConnection, body: bytes, headers: dict[str, str]) -> int:
    """The status of an upload."""
    connection.request("POST", "/segment", body, headers)
    answer = connection.getresponse()
    answer.read()
    return answer.status


def client(port: int, bodies: list[bytes], latencies: list[float], failures: list[str]) -> None:
    """Send bodies one after another."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    for body in bodies:
        start = time.perf_counter()
        try:
            status = post(connection, body, JPEG)
        except (OSError, http.client.HTTPException) as error:
            failures.append(repr(error))
            connection.close()
            continue
        latencies.append(time.perf_counter() - start)
        if status != 200:
            failures.append(str(status))


def bad_uploads(port: int) -> list[str]:
    """Send what is wrong; gives the answers that are not as they should be."""
    wrong = []
    for body, headers, expected in BAD:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        try:
            status = post(connection, body, headers)
        except OSError:  # the server may close while 30 MB are still coming
            status = 413 if expected == 413 else 0
        if status != expected:
            wrong.append(f"{status} instead of {expected}")
        connection.close()
    # Ends in the middle of its body.
    with socket.create_connection(("127.0.0.1", port)) as broken:
        broken.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    return wrong


def main() -> None:
    """Run the test, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, exported or not")
    parser.add_argument("--requests", type=int, default=400, help="for each number of clients")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--size", type=int, default=640, help="width of the images")
    parser.add_argument("--threads", type=int, default=1, help="of the processor for an image")
    args = parser.parse_args()
    photos = [photo(args.size, seed) for seed in range(16)]
    print(f"{platform.machine()}, {os.cpu_count()} cores; images {args.size} x {args.size * 3 // 4}; {args.model}")
    print(f"{'clients':>7} {'requests/s':>10} {'median ms':>10} {'p99 ms':>8} {'memory MB':>10} {'failures':>8}")
    failed = False
    with served(args.model, args.threads) as (port, pid):
        client(port, photos, [], [])  # warm up
        for clients in args.clients:
            latencies: list[float] = []
            failures: list[str] = []
            each = max(1, args.requests // clients)
            bodies = (photos * (each // len(photos) + 1))[:each]
            arguments = (port, bodies, latencies, failures)
            threads = [threading.Thread(target=client, args=arguments) for _ in range(clients)]
            start = time.perf_counter()
            for thread in threads:
                thread.start()
            failures += bad_uploads(port)
            for thread in threads:
                thread.join()
            rate = len(latencies) / (time.perf_counter() - start)
            p99 = sorted(latencies)[min(len(latencies) - 1, int(0.99 * len(latencies)))]
            median = statistics.median(latencies)
            print(
                f"{clients:7} {rate:10.1f} {1000 * median:10.1f} {1000 * p99:8.1f} {memory(pid):10.0f} "
                f"{len(failures):8}",
                *sorted(set(failures)),
                flush=True,
            )
            failed |= bool(failures)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
