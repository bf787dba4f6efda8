"""What clients ask about the server itself: health, switches, the served models. Telemetry is taken and dropped."""

from starlette.responses import Response

from tinsmith.api.calls import Call, Services, answer
from tinsmith.api.openapi import document
from tinsmith.wire import service_types


def health(services: Services) -> Response:
    """GET /healthz: 200 once requests can be worked on, 503 with the engine's progress before. Needs no key."""
    state, progress = services.catalog.state
    return (
        answer(service_types.Health("ok")) if state == "ready" else answer(service_types.Health(state, progress), 503)
    )


async def openapi(_call: Call) -> Response:
    """GET /openapi.json: what this server takes and answers."""
    return answer(document())


async def client_config(call: Call) -> Response:
    """POST /client/config."""
    await call.json(service_types.ClientConfigRequest)
    settings = call.services.settings
    return answer(
        service_types.ClientConfigResponse(
            pjwt_auth_enabled=settings.token_minutes > 0, sample_use_retrieve_futures=settings.batched_polling
        )
    )


async def client_dynamic_config(call: Call) -> Response:
    """POST /client/dynamic_config."""
    await call.json(service_types.ClientConfigRequest)
    return answer(service_types.ClientDynamicConfigResponse())


async def server_capabilities(call: Call) -> Response:
    """GET /get_server_capabilities: every served model, once under each of its names."""
    catalog = call.services.catalog
    contexts = catalog.contexts()
    supported = [
        service_types.SupportedModel(name, contexts[base]) for base in contexts for name in catalog.names(base)
    ]
    return answer(service_types.ServerCapabilities(supported))


async def telemetry(call: Call) -> Response:
    """POST /telemetry."""
    await call.json(service_types.TelemetryRequest, call.services.settings.max_body_bytes)
    return answer(service_types.TelemetryResponse())
