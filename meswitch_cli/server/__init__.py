"""The OpenAI-compatible HTTP server over an engine: `app.create_app` of a `service.Service`."""
