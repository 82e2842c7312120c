"""The servers under test: `servers.hf` (Transformers) and `servers.vllm` (vLLM). They know nothing of load tests."""
