"""A Locust program that sends streaming requests to OpenAI-compatible servers and writes one record per request."""
