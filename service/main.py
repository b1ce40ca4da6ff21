"""`service.main:app`, for servers that want a ready object. `python -m service` is the usual way to start."""

from service.app import create_app

app = create_app()
