"""A bare HTTP client: for what the SDK never sends, such as broken bodies and the same request twice."""

from collections.abc import Sequence
from typing import Any, Self

import httpx
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.types import Datum, ForwardBackwardInput, ForwardBackwardRequest

PROTOBUF = {"Content-Type": "application/x-protobuf"}
FOREVER = 60.0


class RawClient:
    """Posts to /api/v1 of one server under one key. A model's next free seq is `seq[model_id]`."""

    def __init__(self, base_url: str, key: str = "tml-local") -> None:
        self._http = httpx.Client(
            base_url=f"{base_url}/api/v1", headers={"X-API-Key": key}, timeout=FOREVER, trust_env=False
        )
        self.seq: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """One HTTP request, answered or refused."""
        return self._http.request(method, path, **arguments)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """A JSON body."""
        return self.request("POST", path, json=body)

    def post_protobuf(self, body: bytes, headers: dict[str, str] | None = None) -> httpx.Response:
        """A forward_backward body as it is."""
        return self.request("POST", "/forward_backward", content=body, headers=PROTOBUF | (headers or {}))

    def create_session(self) -> str:
        """The id of a new session."""
        answer = self.post("/create_session", {"tags": [], "sdk_version": "0.38.0", "type": "create_session"})
        answer.raise_for_status()
        session_id: str = answer.json()["session_id"]
        return session_id

    def create_model(self, session_id: str, number: int = 0, rank: int = 4) -> str:
        """The id of a new LoRA model with seed 7."""
        body = {"session_id": session_id, "model_seq_id": number, "base_model": "tiny", "type": "create_model"}
        answer = self.post("/create_model", body | {"lora_config": {"rank": rank, "seed": 7}})
        model_id: str = self.result(answer).json()["model_id"]
        self.seq[model_id] = 1
        return model_id

    def take_seq(self, model_id: str) -> int:
        """The next seq of a model, used up by this call."""
        self.seq[model_id] += 1
        return self.seq[model_id] - 1

    def forward_backward(
        self, model_id: str, seq: int, datums: Sequence[Datum], loss: str = "cross_entropy"
    ) -> httpx.Response:
        """Submits a request as the SDK would."""
        return self.post_protobuf(forward_backward_message(model_id, seq, datums, loss).SerializeToString())

    def optim_step(self, model_id: str, seq: int, **params: float) -> httpx.Response:
        """Submits an AdamW step."""
        body = {"model_id": model_id, "seq_id": seq, "type": "optim_step", "adam_params": params}
        return self.post("/optim_step", body)

    def result(self, submitted: httpx.Response, *, protobuf: bool = False) -> httpx.Response:
        """The answer to what was submitted, once there is one."""
        assert submitted.status_code == 200, submitted.text
        headers = {"Accept": PROTOBUF["Content-Type"]} if protobuf else {}
        request_id = submitted.json()["request_id"]
        while True:
            answer = self.request("POST", "/retrieve_future", json={"request_id": request_id}, headers=headers)
            if answer.status_code != 408:
                return answer


def forward_backward_message(
    model_id: str, seq: int, datums: Sequence[Datum], loss: str = "cross_entropy"
) -> pb.ForwardBackwardRequest:
    """The SDK's own message, to be broken before it is sent."""
    data = ForwardBackwardInput(data=list(datums), loss_fn=loss)
    request = ForwardBackwardRequest(forward_backward_input=data, model_id=model_id, seq_id=seq)
    return forward_backward_request_to_proto(request)


def decoded_logprobs(answer: httpx.Response) -> bytes:
    """The logprobs bytes of the first datums of a protobuf answer."""
    output = pb.ForwardBackwardOutput.FromString(answer.content)
    data: bytes = output.loss_fn_outputs[0].fields["logprobs"].data
    return data
