"""A Locust program that sends streaming requests to OpenAI-compatible servers and writes one record per request."""

# Also where the package is not installed, as in the containers; pyproject.toml has the same.
__version__ = "0.1.0"
