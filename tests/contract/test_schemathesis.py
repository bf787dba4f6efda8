"""The OpenAPI document is the truth: it names every route, and what it describes is answered as it says.

schemathesis makes requests from the document, right and wrong ones.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.contract.api_fixtures import CAPABILITIES, Api, running_api
from tests.contract.test_every_route import walk
from tinsmith.api.descriptions import DESCRIBED
from tinsmith.api.openapi import document

KEY = "tml-test"
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
    ignored_auth,
]
EXAMPLES = 10  # of each route; few, since there are dozens


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    capable = replace(CAPABILITIES, vocab_size=1280)
    with running_api(tmp_path_factory.mktemp("api"), capable, api_keys=(KEY,), poll_seconds=0.1) as api:
        yield api


@pytest.fixture(scope="module")
def described(api: Api) -> Any:
    schema = schemathesis.openapi.from_dict(document())
    schema.config.update(base_url=api.base_url)
    schema.config.phases.coverage.enabled = False  # thousands of cases more, minutes; it found what is mended by now
    return schema


def test_every_route_is_described_and_nothing_else(api: Api) -> None:
    assert {(method, path) for method, path in walk(api.routes) if method != "HEAD"} == set(DESCRIBED)
    assert api.http.get("/openapi.json").json() == document()


schemathesis.openapi.media_type("application/x-protobuf", st.binary(max_size=100))
# Under /v1 are the same handlers as under the other prefixes.
schema = schemathesis.pytest.from_fixture("described").exclude(path_regex="^/v1/")


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_what_is_described_is_answered_as_described(case: Any) -> None:
    case.call_and_validate(headers={"X-API-Key": KEY}, checks=CHECKS, timeout=60)
