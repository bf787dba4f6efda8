"""One tenant's samples, one after the other, from a process of its own: nothing of its own makes it wait.

    python -m benchmarks.one_by_one URL SAMPLER FIRST_SEQ BODY TIMES

BODY is the JSON of a sample without its sampler and its place. Prints the seconds of each, from submission to result,
as JSON.
"""

import argparse
import asyncio
import http.client
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 120.0  # seconds, for one answer
HEADERS = {"x-api-key": "tml-local", "content-type": "application/json"}


async def seconds_of_each(base_url: str, sampler: str, first_seq: int, body: dict[str, Any], times: int) -> list[float]:
    """Runs this module. Raises RuntimeError if it fails."""
    arguments = [base_url, sampler, str(first_seq), json.dumps(body), str(times)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.one_by_one", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"samples one by one ended with code {process.returncode}")
    seconds: list[float] = json.loads(output)
    return seconds


def sample(connection: http.client.HTTPConnection, body: dict[str, Any]) -> None:
    """Submits one, and waits for its result."""
    status, answer = _post(connection, "/asample", body)
    if status != 200:
        raise RuntimeError(f"{status}: {answer[:200]!r}")
    wanted = {"request_id": json.loads(answer)["request_id"]}
    while (ended := _post(connection, "/retrieve_future", wanted))[0] == 408:
        pass
    if ended[0] != 200 or ended[1].startswith(b'{"error"'):
        raise RuntimeError(f"{ended[0]}: {ended[1][:200]!r}")


def _post(connection: http.client.HTTPConnection, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
    connection.request("POST", f"/api/v1{path}", json.dumps(body), HEADERS)
    response = connection.getresponse()
    return response.status, response.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("sampler")
    parser.add_argument("first_seq", type=int)
    parser.add_argument("body", type=json.loads)
    parser.add_argument("times", type=int)
    arguments = parser.parse_args()
    address = urlsplit(arguments.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=PATIENCE)
    seconds = []
    for seq in range(arguments.first_seq, arguments.first_seq + arguments.times):
        began = time.perf_counter()
        sample(connection, {**arguments.body, "sampling_session_id": arguments.sampler, "seq_id": seq})
        seconds.append(time.perf_counter() - began)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
