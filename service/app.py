"""The application factory: joins the routes of chapter 3 with the observer that listens to them."""

from typing import Any

from mlops_course.serving import Observer, Service, Settings, build_app, load_settings
from service.observer import ServiceObserver


def create_app(
    settings: Settings | None = None,  # from the environment if not given
    observer: Observer | None = None,  # metrics, and one JSON line per request on stdout, if not given
) -> Service:
    """Build the application. The model is loaded when the application starts, not here."""
    chosen = settings or load_settings()
    listener = observer or ServiceObserver(chosen)
    app = build_app(chosen, listener)
    if isinstance(listener, ServiceObserver):
        listener.watch(app.runtime)
    return app


def openapi_document() -> dict[str, Any]:
    """Return the published contract: the OpenAPI document with default settings, whatever the environment says."""
    return build_app(Settings.model_construct()).openapi()
